import type { FileHandle } from "node:fs/promises";
import { isZero, KiB, MiB } from "../../bytes/index.js";
import type { DiskPiece } from "../../transfer/index.js";
import type { PartialFile } from "./partial-file.js";
import type { RestoreTarget } from "./target.js";
import { UnderWay } from "./under-way.js";

/** Zeroes are looked for in steps of this many bytes; a step that is all zero becomes a hole. */
const STEP = 64 * KiB;

/** Bytes whose writing to a file is under way: as many calls as Node has threads for, of a few MiB. */
export const FILE_IN_FLIGHT = 8 * MiB;

/**
 * A raw file, sparse: what reads as zero is not written.
 *
 * @param length bytes of the finished file
 */
export async function rawFileTarget(partial: PartialFile, length: number): Promise<RestoreTarget> {
  const file = await partial.create();
  const writes = new UnderWay(FILE_IN_FLIGHT);
  const abort = async (): Promise<void> => {
    await writes.end();
    await file.close();
    await partial.remove();
  };
  try {
    await file.truncate(length);
  } catch (error) {
    await abort();
    throw error;
  }
  let written = 0;
  return {
    get written() {
      return written;
    },
    abort,
    async write({ offset, bytes }: DiskPiece) {
      if (bytes === undefined) return;
      for (const { start, end } of nonZeroRuns(bytes)) {
        const part = bytes.subarray(start, end);
        await writes.begin(part.length, () => writeAll(file, part, offset + start));
        written += part.length;
      }
    },
    settle: () => writes.settle(),
    async commit() {
      await writes.settle();
      await file.sync();
      await file.close();
      await partial.commit();
    },
  };
}

/** The parts of a buffer that are not zero, in steps of 64 KiB. */
export function* nonZeroRuns(bytes: Buffer): Generator<{ start: number; end: number }> {
  let start: number | undefined;
  for (let at = 0; at < bytes.length; at += STEP) {
    const zero = isZero(bytes.subarray(at, at + STEP));
    if (zero && start !== undefined) yield { start, end: at };
    if (zero) start = undefined;
    else start ??= at;
  }
  if (start !== undefined) yield { start, end: bytes.length };
}

/** Writes all of `bytes`, however many calls it takes. */
export async function writeAll(file: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length;) {
    const { bytesWritten } = await file.write(bytes, done, bytes.length - done, position + done);
    done += bytesWritten;
  }
}
