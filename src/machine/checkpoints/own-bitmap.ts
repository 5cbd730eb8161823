import { parseBitmapName, type BitmapIdentity } from "../../point/index.js";
import type { SourceBitmap, SourceDisk } from "../source.js";

/** A bitmap of ours and of one repository, on a disk. */
export interface OwnBitmap extends BitmapIdentity {
  readonly bitmap: SourceBitmap;
}

/** Our bitmaps of one repository that a disk carries, newest checkpoint first. */
export function ownBitmaps(disk: Pick<SourceDisk, "bitmaps">, repositoryTag: string): OwnBitmap[] {
  return disk.bitmaps
    .flatMap((bitmap) => {
      const identity = parseBitmapName(bitmap.name);
      return identity?.repository === repositoryTag ? [{ ...identity, bitmap }] : [];
    })
    .sort((a, b) => (a.checkpoint < b.checkpoint ? 1 : -1));
}

/**
 * Bytes per bit of a disk's checkpoints: those of the backup's clusters or, where these are larger, of the disk's
 * own. A disk that is cut and grown back loses the bits behind the cut, but qcow2 keeps the bytes of the cluster
 * that was cut; with a bit for the whole of it, what was written there stays marked.
 */
export function granularityOf(disk: Pick<SourceDisk, "imageClusterSize">, clusterSize: number): number {
  return Math.max(disk.imageClusterSize, clusterSize);
}

/** Why a bitmap does not hold all writes to its image since its checkpoint; undefined when it does. */
export function faultOf(bitmap: SourceBitmap): string | undefined {
  if (bitmap.inconsistent) return "bitmap inconsistent: QEMU did not shut down cleanly";
  if (bitmap.busy) return "bitmap is in use by another program";
  if (!bitmap.recording) return "bitmap does not record";
  return undefined;
}
