import type { Stats } from "node:fs";
import { lstat, realpath, stat } from "node:fs/promises";
import type { Writable } from "node:stream";
import type { IoOptions } from "../../bytes/index.js";
import { BusyError, UsageError } from "../../errors/index.js";
import { formatOf, ImageExport, requireStorageDaemon } from "../../machine/index.js";
import type { NbdUri } from "../../nbd/index.js";
import type { BitmapIdentity } from "../../point/index.js";
import type { DiskAccess } from "./disk-access.js";
import { openBlockDevice } from "./file-disk.js";
import { isLocked } from "./file-lock.js";
import { inPlaceTarget } from "./in-place.js";
import { isEmptyExport, openNbdDisk } from "./nbd-disk.js";
import { PartialFile } from "./partial-file.js";
import { qcow2FileTarget } from "./qcow2-file.js";
import { rawFileTarget } from "./raw-file.js";
import { streamTarget } from "./stream.js";
import type { PreparedTarget } from "./target.js";

/** Formats in which a disk is restored. */
export const TARGET_FORMATS = ["raw", "qcow2"] as const;
export type TargetFormat = (typeof TARGET_FORMATS)[number];

/** Where a disk goes: a file or block device, an NBD export, or a stream (raw only). */
export type TargetPlace =
  { readonly path: string } | { readonly uri: NbdUri; readonly text: string } | { readonly stream: Writable };

/** How targets are written. */
export interface TargetOptions extends IoOptions {
  readonly format: TargetFormat;
  /** Replace, or write over, what is there. */
  readonly force: boolean;
  /** Write in place, and only what differs. */
  readonly onlyChanged: boolean;
  /** Only a part of the disk is restored: not in place. */
  readonly isPart: boolean;
  /** The storage daemon's program, for existing images and for checkpoints. */
  readonly storageDaemon: string | undefined;
  /** The checkpoint to leave in the image (qcow2 files only), so that the next backup continues its point. */
  readonly track: BitmapIdentity | undefined;
}

/**
 * Checks that a target may be written. Nothing of it is changed.
 *
 * @throws {UsageError} when it may not be written
 * @throws {BusyError} when it is in use
 */
export async function prepareTarget(place: TargetPlace, options: TargetOptions): Promise<PreparedTarget> {
  requireTrackable(place, options);
  if ("stream" in place) return prepareStream(place.stream, options);
  if ("uri" in place) return await prepareExport(place.uri, place.text, options);
  const path = await followed(place.path);
  const found = await lookAt(path);
  if (found?.isBlockDevice() === true) return await prepareDevice(path, options);
  if (found?.isFile() === true && found.size > 0 && options.onlyChanged) {
    return await prepareExisting(path, options);
  }
  return await prepareFile(path, options);
}

/** What a symbolic link leads to: volumes (/dev/<group>/<volume>) and many images are named by one. */
async function followed(path: string): Promise<string> {
  const found = await lookAt(path);
  if (found?.isSymbolicLink() !== true) return path;
  // One that leads nowhere is refused for what it is.
  return (await lookAt(path, stat)) === undefined ? path : await realpath(path);
}

async function lookAt(path: string, look: typeof lstat = lstat): Promise<Stats | undefined> {
  try {
    return await look(path);
  } catch (error) {
    if (["ENOENT", "ENOTDIR"].includes((error as NodeJS.ErrnoException).code ?? "")) return undefined;
    throw error;
  }
}

function prepareStream(stream: Writable, { format, onlyChanged }: TargetOptions): PreparedTarget {
  if (format !== "raw" || onlyChanged) {
    throw new UsageError("Standard output takes raw bytes only", {
      hint: "Leave out --format and --only-changed, or restore to a file",
    });
  }
  return {
    name: "-",
    isInPlace: true,
    begin: () => Promise.resolve(streamTarget(stream)),
    dispose: () => Promise.resolve(),
  };
}

async function prepareFile(path: string, options: TargetOptions): Promise<PreparedTarget> {
  const { format, force, track } = options;
  const file = await PartialFile.prepare(path, { force });
  // It is needed when all is written: better to know now that there is none.
  if (track !== undefined) await requireStorageDaemon(options);
  return {
    name: path,
    isInPlace: false,
    begin: (length) =>
      format === "raw" ? rawFileTarget(file, length) : qcow2FileTarget(file, length, options),
    dispose: () => Promise.resolve(),
  };
}

/** An image that is there, to be changed where it differs: through a storage daemon, so that no machine can run on it. */
async function prepareExisting(path: string, options: TargetOptions): Promise<PreparedTarget> {
  requireWhole(path, options);
  requireForce(path, "it exists and is not empty", options);
  if (await isLocked(path)) {
    throw new BusyError("TM_TARGET_BUSY", `Cannot restore to ${path}: another process has it locked`, {
      hint: "A machine seems to run on it; shut it down first",
    });
  }
  const { format, storageDaemon, track, signal } = options;
  if (format === "raw" && (await formatOf(path)) === "qcow2") {
    throw new UsageError(`Cannot restore raw bytes into ${path}: it is a qcow2 image`, {
      hint: "Give --format qcow2",
    });
  }
  const image = await ImageExport.open(path, { format, storageDaemon, signal });
  const open = async (length: number): Promise<DiskAccess> => {
    await image.serve(length, { signal });
    return await openNbdDisk({ target: image.address, exportName: image.exportName }, { signal });
  };
  const target = inPlace(path, { open, end: () => image.close() }, options);
  if (track === undefined) return target;
  try {
    await image.requireTrackable(track.repository, { signal });
  } catch (error) {
    await target.dispose();
    throw error;
  }
  return tracked(target, image, track, { signal });
}

async function prepareDevice(path: string, options: TargetOptions): Promise<PreparedTarget> {
  requireWhole(path, options);
  requireRaw(path, options);
  requireForce(path, "a block device is written over", options);
  return openInPlace(path, await openBlockDevice(path), options);
}

async function prepareExport(uri: NbdUri, text: string, options: TargetOptions): Promise<PreparedTarget> {
  requireWhole(text, options);
  requireRaw(text, options);
  const { signal, force } = options;
  if (!force && !(await isEmptyExport({ target: uri }, { signal }))) {
    requireForce(text, "the export holds data, or its server cannot tell", options);
  }
  return openInPlace(text, await openNbdDisk({ target: uri }, { signal }), options);
}

/** A disk that is open already, and has the size that it has. */
function openInPlace(name: string, disk: DiskAccess, options: TargetOptions): PreparedTarget {
  return { ...inPlace(name, { disk, open: () => Promise.resolve(disk) }, options), capacity: disk.size };
}

/** How a disk is opened that is written in place, and let go. */
interface InPlaceDisk {
  /** If it is open already. */
  readonly disk?: DiskAccess;
  /** @param length bytes of the disk that it is to hold */
  readonly open: (length: number) => Promise<DiskAccess>;
  /** Ends what is there beside the disk; also when that was never opened. */
  readonly end?: () => Promise<void>;
}

function inPlace(name: string, { open, end, ...held }: InPlaceDisk, options: TargetOptions): PreparedTarget {
  let { disk } = held;
  let ended: Promise<void> | undefined;
  const finish = (): Promise<void> => (ended ??= (disk?.close() ?? Promise.resolve()).then(end));
  return {
    name,
    isInPlace: true,
    async begin(length, whole = () => Promise.resolve()) {
      disk = await open(length);
      const target = inPlaceTarget(disk, options);
      return {
        ...target,
        get written() {
          return target.written;
        },
        async commit() {
          await target.commit();
          await whole();
          await finish();
        },
        // What could not be written is what is told.
        abort: () => finish().catch(() => undefined),
      };
    },
    dispose: () => finish().catch(() => undefined),
  };
}

/**
 * A target in an image that keeps a checkpoint of the point. The repository's old ones go before anything is written, and the new
 * one comes when all is written: a restore that dies in between leaves none, and the next backup compares.
 */
function tracked(
  target: PreparedTarget,
  image: ImageExport,
  checkpoint: BitmapIdentity,
  io: IoOptions,
): PreparedTarget {
  return {
    ...target,
    async begin(length) {
      // Before it is resized: an image with a broken bitmap cannot be.
      await image.removeCheckpoints(checkpoint.repository, io);
      return await target.begin(length, () => image.track(checkpoint));
    },
  };
}

function requireTrackable(place: TargetPlace, { track, format, isPart }: TargetOptions): void {
  if (track === undefined) return;
  if ("path" in place && format === "qcow2" && !isPart) return;
  const name = "path" in place ? place.path : "uri" in place ? place.text : "standard output";
  throw new UsageError(`Cannot leave a checkpoint in ${name}: only whole qcow2 files have room for one`, {
    hint: "Restore to a file with --format qcow2, or leave out --track",
  });
}

function requireForce(name: string, why: string, { force }: TargetOptions): void {
  if (force) return;
  throw new UsageError(`Cannot restore to ${name}: ${why}`, {
    hint: "Choose another target, or give --force",
  });
}

function requireRaw(name: string, { format }: TargetOptions): void {
  if (format === "raw") return;
  throw new UsageError(`Cannot restore ${format} to ${name}: it is a disk itself`, {
    hint: "Leave --format out",
  });
}

function requireWhole(name: string, { isPart }: TargetOptions): void {
  if (!isPart) return;
  throw new UsageError(`Cannot restore a part of a disk in place, to ${name}`, {
    hint: "Restore the range to a new file or to standard output",
  });
}
