import { roundDown } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
import { endOf, normalize, subtract, union, widen, type Extent } from "../extent/index.js";
import { planningRanges, type DiskShape } from "./plan.js";

/** What a witness is chosen by, and compared with. */
export interface WitnessFacts extends DiskShape {
  readonly parentVirtualSize: number;
  /** What changed since the parent, as the bitmap has it. */
  readonly recorded: (range: Extent) => Promise<readonly Extent[]>;
  /** What reads as zero, by the allocation map. */
  readonly zero: (range: Extent) => Promise<readonly Extent[]>;
  /** Where the parent holds data among sorted extents. */
  readonly parentData: (extents: readonly Extent[]) => Promise<readonly Extent[]>;
  /** The frozen disk's bytes. */
  readonly read: (extent: Extent) => Promise<Buffer>;
  /** The parent's bytes. */
  readonly readParent: (extent: Extent) => Promise<Buffer>;
}

/**
 * Whether the bitmap has all that changed. It has not when the disk shrank and grew back: what was cut off
 * reads as zero and looks clean. The allocation map does not always show it either: QEMU remembers where a raw
 * file holds data, and does not forget it when the file is cut.
 *
 * One cluster tells, the witness: the last one that is clean by both maps and holds data in the parent. A cut before
 * or inside it changed it. Behind it everything is stored anew or was zero, and is zero after a cut.
 */
export async function isBitmapComplete(facts: WitnessFacts): Promise<boolean> {
  const { virtualSize, clusterSize, parentVirtualSize } = facts;
  for (const range of [...planningRanges(facts)].reverse()) {
    const changed = widen(await facts.recorded(range), clusterSize, virtualSize);
    const zero = normalize(await facts.zero(range));
    const last = (await facts.parentData(subtract([range], union(changed, zero)))).at(-1);
    if (last === undefined) continue;
    const offset = roundDown(endOf(last) - 1, clusterSize);
    // All of it, what the map says is zero too: a cut inside it leaves zeroes at its end.
    const end = Math.min(offset + clusterSize, virtualSize, parentVirtualSize);
    return await isAsInParent(facts, { offset, length: end - offset });
  }
  return true;
}

async function isAsInParent({ read, readParent }: WitnessFacts, extent: Extent): Promise<boolean> {
  const now = await read(extent);
  try {
    return now.equals(await readParent(extent));
  } catch (error) {
    // A damaged parent vouches for nothing: stored anew, the point does not need it.
    if (error instanceof DamageError) return false;
    throw error;
  }
}
