import { dirname } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { MiB, roundDown } from "../../bytes/index.js";
import { formatRunObject } from "../../point/index.js";
import type { QmpClient } from "../../qmp/index.js";
import { ScratchFullError } from "../errors.js";
import type { ScratchBound } from "../guard/orders.js";
import { freeSpace, type Scratch } from "./scratch.js";

/** Scratch files that share a limit. */
interface Group {
  readonly limit: number;
  readonly members: readonly Scratch[];
}

/** What stays free on the file system of a scratch file: this share of what was free when the backup began … */
const RESERVE_SHARE = 1 / 8;
/** … but no more than this. */
const MOST_RESERVE = 64 * MiB;

/** Below this much room a group counts as full: rearming for less would only delay the end. */
const LEAST_ROOM = MiB;

/**
 * Bounds what scratch files take. QEMU is armed to report when a file grows past its share; then the room
 * that the group still has is shared out anew, so one busy disk may use what quiet ones leave.
 */
export class ScratchLimit {
  readonly #qmp: QmpClient;
  readonly #run: string;
  readonly #groups: readonly Group[];
  /** The same for whoever can only look at the files. */
  readonly bounds: readonly ScratchBound[];

  private constructor(
    qmp: QmpClient,
    run: string,
    groups: readonly Group[],
    bounds: readonly ScratchBound[],
  ) {
    this.bounds = bounds;
    this.#qmp = qmp;
    this.#run = run;
    this.#groups = groups;
  }

  /**
   * Arms all scratch files.
   *
   * @param limit bytes for all of them; default half of what is free, on each file system
   * @throws {ScratchFullError} when the limit leaves no room at all
   */
  static async arm(
    qmp: QmpClient,
    run: string,
    scratch: readonly Scratch[],
    limit: number | undefined,
    options: IoOptions = {},
  ): Promise<ScratchLimit> {
    const groups =
      limit !== undefined ? [{ limit, members: scratch }] : await Promise.all(groupByFileSystem(scratch));
    const armed = new ScratchLimit(qmp, run, groups, await Promise.all(groups.map(boundOf)));
    for (const group of groups) {
      if (await armed.#share(group, options)) continue;
      throw new ScratchFullError(
        `Cannot arm the scratch files: a limit of ${group.limit} bytes leaves no room to begin`,
        {
          hint: "Free space, name another directory with --scratch, or raise --scratch-limit",
        },
      );
    }
    return armed;
  }

  /**
   * Takes QEMU's report that a file passed its share.
   *
   * @param node the file node of the event
   * @returns the limit that was reached, in bytes; undefined when there was room left and QEMU is armed again
   */
  async passed(node: string): Promise<number | undefined> {
    const group = this.#groups.find(({ members }) => members.some((item) => this.#nodeOf(item) === node));
    if (group === undefined || (await this.#share(group))) return undefined;
    return group.limit;
  }

  /** The disk of a scratch file's node, for messages. */
  diskOf(node: string): string | undefined {
    const all = this.#groups.flatMap(({ members }) => members);
    return all.find((item) => this.#nodeOf(item) === node)?.disk.name;
  }

  /** Shares a group's room out. @returns false when there is none left */
  async #share({ limit, members }: Group, options: IoOptions = {}): Promise<boolean> {
    const statistics = await this.#qmp.execute("query-blockstats", { "query-nodes": true }, options);
    const taken = members.map(
      (item) => statistics.find(({ nodeName }) => nodeName === this.#nodeOf(item))?.highestWrite ?? 0,
    );
    const room = limit - taken.reduce((sum, bytes) => sum + bytes, 0);
    if (room < LEAST_ROOM) return false;
    for (const [index, item] of members.entries()) {
      const threshold = (taken[index] ?? 0) + roundDown(room / members.length, 512);
      await this.#qmp.execute(
        "block-set-write-threshold",
        { "node-name": this.#nodeOf(item), "write-threshold": threshold },
        options,
      );
    }
    return true;
  }

  #nodeOf({ number }: Scratch): string {
    return formatRunObject({ run: this.#run, disk: number, kind: "file" });
  }
}

async function boundOf({ limit, members }: Group): Promise<ScratchBound> {
  const files = members.map(({ file }) => file);
  const free = await Promise.all(files.map((file) => freeSpace(dirname(file))));
  const reserve = Math.min(MOST_RESERVE, Math.floor(Math.min(...free) * RESERVE_SHARE));
  return { limit, reserve, files };
}

function groupByFileSystem(scratch: readonly Scratch[]): Promise<Group>[] {
  const systems = new Map<number, Scratch[]>();
  for (const item of scratch) systems.set(item.fileSystem, [...(systems.get(item.fileSystem) ?? []), item]);
  return [...systems.values()].map(async (members) => {
    const [first] = members;
    const free = first === undefined ? 0 : await freeSpace(dirname(first.file));
    return { limit: Math.floor(free / 2), members };
  });
}
