import { QmpRecord } from "./record.js";
import {
  decodeBlockDevices,
  decodeExports,
  decodeMigration,
  decodeGraph,
  decodeJobs,
  decodeNodes,
  decodeProperties,
  decodeStatistics,
} from "./results.js";

/**
 * The commands that tidemark sends: their arguments as types, their results decoded and checked. Names and
 * arguments are those of the QAPI reference.
 */

/** A bitmap on a node; "merge" accepts it in place of a bare name since 4.1. */
interface BitmapOnNode {
  readonly node: string;
  readonly name: string;
}

interface BitmapAdd extends BitmapOnNode {
  readonly granularity?: number;
  readonly persistent?: boolean;
  readonly disabled?: boolean;
}

interface BitmapMerge {
  readonly node: string;
  readonly target: string;
  readonly bitmaps: readonly (string | BitmapOnNode)[];
}

interface Backup {
  readonly "job-id": string;
  readonly device: string;
  readonly target: string;
  readonly sync: "none";
  readonly "auto-dismiss": boolean;
  readonly "filter-node-name"?: string;
}

/** One action of a transaction: all of them happen, or none. */
export type TransactionAction =
  | { readonly type: "block-dirty-bitmap-add"; readonly data: BitmapAdd }
  | { readonly type: "block-dirty-bitmap-merge"; readonly data: BitmapMerge }
  | { readonly type: "block-dirty-bitmap-remove"; readonly data: BitmapOnNode }
  | { readonly type: "blockdev-backup"; readonly data: Backup };

/** Options of a node or of an image; drivers have too many to name here. */
export type DriverOptions = Readonly<Record<string, unknown>> & { readonly driver: string };

interface Command<Arguments, Result> {
  readonly decode: (value: unknown) => Result;
  /** Never there at run time: carries the type of the arguments. */
  readonly arguments?: Arguments;
}

function command<Arguments, Result>(decode: (value: unknown) => Result): Command<Arguments, Result> {
  return { decode };
}

type None = undefined;
const done = (): undefined => undefined;

export const COMMANDS = {
  "query-block": command<None, ReturnType<typeof decodeBlockDevices>>(decodeBlockDevices),
  "query-named-block-nodes": command<{ readonly flat: boolean }, ReturnType<typeof decodeNodes>>(decodeNodes),
  "x-debug-query-block-graph": command<None, ReturnType<typeof decodeGraph>>(decodeGraph),
  "query-blockstats": command<{ readonly "query-nodes": boolean }, ReturnType<typeof decodeStatistics>>(
    decodeStatistics,
  ),
  "query-jobs": command<None, ReturnType<typeof decodeJobs>>(decodeJobs),
  "query-block-exports": command<None, ReturnType<typeof decodeExports>>(decodeExports),
  "query-name": command<None, string | undefined>((value) =>
    QmpRecord.of(value, "reply to query-name").optionalText("name"),
  ),
  "query-uuid": command<None, string>((value) => QmpRecord.of(value, "reply to query-uuid").text("UUID")),
  "query-status": command<None, string>((value) =>
    QmpRecord.of(value, "reply to query-status").text("status"),
  ),
  "query-migrate": command<None, ReturnType<typeof decodeMigration>>(decodeMigration),
  "query-version": command<None, unknown>((value) => value),
  "query-target": command<None, string>((value) => QmpRecord.of(value, "reply to query-target").text("arch")),
  "query-memory-size-summary": command<None, number>((value) =>
    QmpRecord.of(value, "reply to query-memory-size-summary").size("base-memory"),
  ),
  "query-cpus-fast": command<None, number>(
    (value) => QmpRecord.listOf(value, "reply to query-cpus-fast").length,
  ),
  "query-qmp-schema": command<None, unknown>((value) => value),
  "qom-get": command<{ readonly path: string; readonly property: string }, unknown>((value) => value),
  "qom-list": command<{ readonly path: string }, ReturnType<typeof decodeProperties>>(decodeProperties),
  "blockdev-create": command<{ readonly "job-id": string; readonly options: DriverOptions }, undefined>(done),
  "blockdev-add": command<DriverOptions & { readonly "node-name": string }, undefined>(done),
  block_resize: command<{ readonly "node-name": string; readonly size: number }, undefined>(done),
  "blockdev-del": command<{ readonly "node-name": string }, undefined>(done),
  "block-set-write-threshold": command<
    { readonly "node-name": string; readonly "write-threshold": number },
    undefined
  >(done),
  "job-cancel": command<{ readonly id: string }, undefined>(done),
  "job-dismiss": command<{ readonly id: string }, undefined>(done),
  transaction: command<{ readonly actions: readonly TransactionAction[] }, undefined>(done),
  "nbd-server-start": command<
    {
      readonly addr: { readonly type: "unix"; readonly data: { readonly path: string } };
      readonly "max-connections"?: number;
    },
    undefined
  >(done),
  "nbd-server-stop": command<None, undefined>(done),
  "block-export-add": command<
    {
      readonly type: "nbd";
      readonly id: string;
      readonly "node-name": string;
      readonly name: string;
      readonly writable: boolean;
      readonly bitmaps?: readonly string[];
      readonly "allocation-depth"?: boolean;
    },
    undefined
  >(done),
  "block-export-del": command<{ readonly id: string; readonly mode: "safe" | "hard" }, undefined>(done),
} as const;

/** A command whose arguments and result are typed. */
export type CommandName = keyof typeof COMMANDS;

/** The arguments of a command; `undefined` when it takes none. */
export type CommandArguments<C extends CommandName> = Exclude<
  (typeof COMMANDS)[C]["arguments"],
  C extends CommandsWithout ? never : undefined
>;

/** The decoded result of a command. */
export type CommandResult<C extends CommandName> = ReturnType<(typeof COMMANDS)[C]["decode"]>;

/** Commands that take no arguments. */
export type CommandsWithout = {
  [C in CommandName]: (typeof COMMANDS)[C] extends Command<None, unknown> ? C : never;
}[CommandName];
