import type { FrozenDisk, SourceBitmap, SourceDisk } from "../source.js";
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

/** What the rule depends on. */
export type RemovalContext = Pick<
  BaseContext,
  "repositoryTag" | "catalogue" | "isElsewhere" | "machineUuid"
> & {
  /** Id of the checkpoint that this run starts from: it stays. */
  readonly needed?: string | undefined;
};

/**
 * The catalogue rule: which of our bitmaps on a disk may be removed. Nothing is removed before a newer point
 * of this machine and repository is positively in the catalogue and that point's own bitmap on this disk is
 * healthy. The newest such point says how many checkpoints stay: all runs come to the same answer, whatever died in
 * between and whatever they keep themselves. Those count that are of the same chain and of use: what was committed under
 * another token goes at once (a copied image carries the checkpoints of the one it was copied from), and so does what
 * is broken. What was never committed, or deleted since, goes only when the newer point has the same token, or no other
 * machine of the repository has it: this one may be backed up under another name, too. Bitmaps that cannot be removed now
 * (read-only node, in use) are left out.
 *
 * @throws whatever the catalogue throws: an error is never "absent"
 */
export async function bitmapsToRemove(
  disk: Pick<SourceDisk, "name" | "bitmaps">,
  context: RemovalContext,
): Promise<RemovableBitmap[]> {
  const { repositoryTag, catalogue, isElsewhere, machineUuid, needed } = context;
  /** Tokens of the healthy and committed bitmaps newer than the one being judged. */
  const newer: string[] = [];
  let kept = 1;
  const removable: RemovableBitmap[] = [];
  for (const { bitmap, checkpoint, token } of ownBitmaps(disk, repositoryTag)) {
    const point = await lookUp(catalogue, checkpoint);
    // Nobody can tell: it stays.
    if (point === "unreadable") continue;
    const isCommitted =
      point !== undefined &&
      isOfMachine(point, machineUuid) &&
      point.disks.some((item) => item.token === token);
    const isSound = faultOf(bitmap) === undefined;
    const [newest] = newer;
    const sameChain = newer.filter((other) => other === newest).length;
    // A point that is there, but not ours, says nothing about this bitmap: it stays.
    const mayGo = isCommitted
      ? newest !== undefined && (sameChain >= kept || token !== newest || !isSound)
      : point === undefined &&
        newest !== undefined &&
        (newer.includes(token) || !((await isElsewhere?.(checkpoint)) ?? true));
    if (mayGo && checkpoint !== needed && !bitmap.readOnly && !bitmap.busy) {
      const why = isCommitted ? "old" : "uncommitted";
      removable.push({ disk: disk.name, node: bitmap.node, name: bitmap.name, why });
    }
    if (isCommitted && !bitmap.readOnly && isSound) {
      if (newest === undefined) kept = point.keepCheckpoints ?? 1;
      newer.push(token);
    }
  }
  return removable;
}

/**
 * The rule for a disk that was frozen, and whose point the catalogue holds by now. What was never committed is left to the next
 * recovery: a copy of the repository may have it, whose turn may come before.
 *
 * @throws as `bitmapsToRemove`
 */
export async function bitmapsToRemoveAfter(
  { disk, bitmap }: Pick<FrozenDisk, "disk" | "bitmap">,
  context: RemovalContext,
): Promise<RemovableBitmap[]> {
  const made: SourceBitmap = {
    ...{ name: bitmap, node: disk.node, granularity: 0, dirtyBytes: 0, persistent: disk.canPersist },
    ...{ recording: true, readOnly: false, busy: false, inconsistent: false },
  };
  const removable = await bitmapsToRemove({ name: disk.name, bitmaps: [made, ...disk.bitmaps] }, context);
  return removable.filter(({ why }) => why === "old");
}
