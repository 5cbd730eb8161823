import { randomBytes } from "node:crypto";

/** What a run makes in QEMU: scratch node, its file node, job, export, transient bitmap, creation job. */
export const RUN_OBJECT_KINDS = ["scr", "file", "job", "exp", "tmp", "new"] as const;
export type RunObjectKind = (typeof RUN_OBJECT_KINDS)[number];

/** What the name of a node, job, export or transient bitmap of a run says. */
export interface RunObject {
  /** Id of the run, 8 hex digits. */
  readonly run: string;
  /** Number of the disk within the run, from 0. */
  readonly disk: number;
  readonly kind: RunObjectKind;
}

const RUN_OBJECT = /^tm-([0-9a-f]{8})-(\d{1,4})-(scr|file|job|exp|tmp|new)$/;

/** A new run id: 8 random hex digits. */
export function newRunId(): string {
  return randomBytes(4).toString("hex");
}

/** `tm-<run>-<disk>-<kind>`: at most 22 characters; QEMU's node names end at 31. */
export function formatRunObject(object: RunObject): string {
  return `tm-${object.run}-${object.disk}-${object.kind}`;
}

/** Reads such a name; undefined for a name that is not one of ours, which must never be touched. */
export function parseRunObject(name: string): RunObject | undefined {
  const [, run, disk, kind] = RUN_OBJECT.exec(name) ?? [];
  if (run === undefined || disk === undefined || kind === undefined) return undefined;
  return { run, disk: Number(disk), kind: kind as RunObjectKind };
}
