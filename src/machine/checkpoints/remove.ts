import type { SourceDisk } from "../source.js";
import { isOfMachine, lookUp, type BaseContext } from "./catalogue.js";
import { faultOf, ownBitmaps } from "./own-bitmap.js";

/** A bitmap that may go, and why. */
export interface RemovableBitmap {
  readonly disk: string;
  readonly node: string;
  readonly name: string;
  /** `old`: a newer checkpoint took its place; `uncommitted`: its point never came to be. */
  readonly why: "old" | "uncommitted";
}

/**
 * The catalogue rule: which of our bitmaps on a disk may be removed. Nothing is removed before a newer point
 * of this machine and repository is positively in the catalogue and that point's own bitmap on this disk is
 * healthy. What was committed under another token goes as well: a copied image carries the checkpoints of the one it
 * was copied from. What was never committed goes only when the newer point has the same token: another may be that
 * of another machine of the repository, whose points this catalogue does not know. Bitmaps that cannot be removed now
 * (read-only node, in use) are left out.
 *
 * @param context.keepCheckpoints how many checkpoints are kept, the newest included; default 1
 * @throws whatever the catalogue throws: an error is never "absent"
 */
export async function bitmapsToRemove(
  disk: SourceDisk,
  context: Pick<BaseContext, "repositoryTag" | "catalogue" | "machineUuid"> & {
    readonly keepCheckpoints?: number | undefined;
  },
): Promise<RemovableBitmap[]> {
  const { repositoryTag, catalogue, machineUuid, keepCheckpoints = 1 } = context;
  /** Tokens of the healthy and committed bitmaps newer than the one being judged. */
  const newer: string[] = [];
  const removable: RemovableBitmap[] = [];
  for (const { bitmap, checkpoint, token } of ownBitmaps(disk, repositoryTag)) {
    const point = await lookUp(catalogue, checkpoint);
    // Nobody can tell: it stays.
    if (point === "unreadable") continue;
    const isCommitted =
      point !== undefined &&
      isOfMachine(point, machineUuid) &&
      point.disks.some((item) => item.token === token);
    // A point that is there, but not ours, says nothing about this bitmap: it stays.
    const why = isCommitted ? "old" : "uncommitted";
    const mayGo = isCommitted
      ? newer.length >= keepCheckpoints
      : point === undefined && newer.includes(token);
    if (mayGo && !bitmap.readOnly && !bitmap.busy) {
      removable.push({ disk: disk.name, node: bitmap.node, name: bitmap.name, why });
    }
    if (isCommitted && !bitmap.readOnly && faultOf(bitmap) === undefined) newer.push(token);
  }
  return removable;
}
