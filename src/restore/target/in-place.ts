import { isZero, KiB, MiB } from "../../bytes/index.js";
import { chop, type Extent } from "../../extent/index.js";
import type { DiskPiece } from "../../transfer/index.js";
import type { DiskAccess } from "./disk-access.js";
import type { RestoreTarget } from "./target.js";

/** What is compared at once, where only changes are written. */
const STEP = 4 * KiB;
/** What is read at once for that. */
const CHUNK = 2 * MiB;

/**
 * Restores onto a disk that is there. It cannot be taken back: until `commit` the disk holds a mixture.
 *
 * @param options.onlyChanged reads first, and writes only what differs
 */
export function inPlaceTarget(disk: DiskAccess, options: { readonly onlyChanged: boolean }): RestoreTarget {
  const step = Math.max(STEP, disk.blockSize);
  let written = 0;

  const writeAll = async ({ offset, length, bytes }: DiskPiece): Promise<void> => {
    written += length;
    if (bytes === undefined) await disk.writeZeroes(offset, length);
    else await disk.write(offset, bytes);
  };

  const writeChanged = async (piece: DiskPiece): Promise<void> => {
    for (const { offset, length } of chop([piece], CHUNK)) {
      const start = offset - piece.offset;
      const wanted = piece.bytes?.subarray(start, start + length);
      const held = await disk.read(offset, length);
      for (const run of differences(held, wanted, step)) {
        const bytes = wanted?.subarray(run.offset, run.offset + run.length);
        await writeAll({ offset: offset + run.offset, length: run.length, bytes });
      }
    }
  };

  return {
    get written() {
      return written;
    },
    write: options.onlyChanged ? writeChanged : writeAll,
    settle: () => disk.settle(),
    async commit() {
      await disk.flush();
      await disk.close();
    },
    abort: () => disk.close(),
  };
}

/** Where `held` is not what is wanted (undefined: zeroes), in steps, joined. */
function* differences(held: Buffer, wanted: Buffer | undefined, step: number): Generator<Extent> {
  let start: number | undefined;
  for (let at = 0; at < held.length; at += step) {
    const part = held.subarray(at, at + step);
    const isSame = wanted === undefined ? isZero(part) : part.equals(wanted.subarray(at, at + step));
    if (isSame && start !== undefined) yield { offset: start, length: at - start };
    if (isSame) start = undefined;
    else start ??= at;
  }
  if (start !== undefined) yield { offset: start, length: held.length - start };
}
