import type { Writable } from "node:stream";
import { UsageError } from "../../errors/index.js";
import { PartialFile } from "./partial-file.js";
import { qcow2FileTarget } from "./qcow2-file.js";
import { rawFileTarget } from "./raw-file.js";
import { streamTarget } from "./stream.js";
import type { RestoreTarget } from "./target.js";

/** Formats in which a disk is restored. */
export const TARGET_FORMATS = ["raw", "qcow2"] as const;
export type TargetFormat = (typeof TARGET_FORMATS)[number];

/** Where a disk goes: a file, or a stream (raw only). */
export type TargetPlace = { readonly path: string } | { readonly stream: Writable };

/** A target that may be written, and of which nothing exists yet. */
export type PreparedTarget = {
  /** What to call it. */
  readonly name: string;
} & ({ readonly stream: Writable } | { readonly file: PartialFile; readonly format: TargetFormat });

/** Checks that a target may be written. @throws {UsageError} when it may not @throws {BusyError} when it is in use */
export async function prepareTarget(
  place: TargetPlace,
  options: { readonly format: TargetFormat; readonly force: boolean },
): Promise<PreparedTarget> {
  const { format, force } = options;
  if ("path" in place)
    return { name: place.path, file: await PartialFile.prepare(place.path, { force }), format };
  if (format !== "raw")
    throw new UsageError("Only raw can be written to standard output", { hint: "Leave --format out" });
  return { name: "-", stream: place.stream };
}

/** Begins to write. @param length bytes of the disk, or of the part of it that is restored */
export async function openTarget(target: PreparedTarget, length: number): Promise<RestoreTarget> {
  if ("stream" in target) return streamTarget(target.stream);
  const { name, file, format } = target;
  return format === "raw"
    ? await rawFileTarget(name, file, length)
    : await qcow2FileTarget(name, file, length);
}
