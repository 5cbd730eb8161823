import { roundDown, roundUp } from "../bytes/index.js";
import {
  chop,
  endOf,
  intersect,
  normalize,
  subtract,
  totalLength,
  union,
  widen,
  type Extent,
} from "../extent/index.js";

/** What is known of a range of a disk at the freeze. Lists are sorted; they may reach past the range. */
export interface RangeFacts {
  /** Bytes that may have changed since the parent; undefined where that is not known, and in a full. */
  readonly dirty: readonly Extent[] | undefined;
  /** Bytes that read as zero, by the allocation map of the frozen disk. */
  readonly zero: readonly Extent[];
  /** Bytes that the parent's chain holds as data. */
  readonly parentData: readonly Extent[];
}

/** What to do with a range: both lists consist of whole clusters, the last of which may end at the disk's end. */
export interface RangePlan {
  /** To be read and stored. */
  readonly read: readonly Extent[];
  /** To be stored as explicit zero clusters. */
  readonly zero: readonly Extent[];
}

/** Size of a disk and of its clusters. */
export interface DiskShape {
  readonly virtualSize: number;
  readonly clusterSize: number;
}

/**
 * Decides for each cluster of a range.
 *
 * An increment stores a dirty cluster that reads as zero as an explicit zero cluster: left unallocated, the
 * parent's old data would shine through. The same where the frozen disk reads as zero and the parent holds
 * data, dirty or not: a disk that shrank and grew back between two backups looks clean in its bitmap. Where nobody
 * knows what changed, everything is read that does not read as zero, to be compared with the parent or stored.
 */
export function planRange(range: Extent, facts: RangeFacts, shape: DiskShape): RangePlan {
  const { clusterSize, virtualSize } = shape;
  const zero = wholeClusters(intersect([range], normalize(facts.zero)), shape);
  const held = widen(intersect([range], normalize(facts.parentData)), clusterSize, virtualSize);
  if (facts.dirty === undefined) return { read: subtract([range], zero), zero: intersect(zero, held) };
  const dirty = widen(intersect([range], normalize(facts.dirty)), clusterSize, virtualSize);
  return { read: subtract(dirty, zero), zero: intersect(zero, union(dirty, held)) };
}

/** The clusters that lie in the extents as a whole; the disk's last cluster may be shorter than the others. */
function wholeClusters(extents: readonly Extent[], { virtualSize, clusterSize }: DiskShape): Extent[] {
  return extents
    .map((extent) => {
      const offset = roundUp(extent.offset, clusterSize);
      const end = endOf(extent) >= virtualSize ? virtualSize : roundDown(endOf(extent), clusterSize);
      return { offset, length: end - offset };
    })
    .filter((extent) => extent.length > 0);
}

/** Cuts a disk into ranges that are planned one at a time, so that memory does not grow with the disk. */
export function planningRanges({ virtualSize, clusterSize }: DiskShape): Iterable<Extent> {
  return chop([{ offset: 0, length: virtualSize }], CLUSTERS_PER_RANGE * clusterSize);
}

const CLUSTERS_PER_RANGE = 65_536;

/** Packs extents into units of work of at most `unitBytes` (a multiple of the cluster size), in order. */
export function* packUnits(extents: readonly Extent[], unitBytes: number): Generator<Extent[]> {
  let unit: Extent[] = [];
  let used = 0;
  for (const extent of extents) {
    for (let offset = extent.offset; offset < endOf(extent);) {
      const length = Math.min(unitBytes - used, endOf(extent) - offset);
      unit.push({ offset, length });
      offset += length;
      used += length;
      if (used === unitBytes) {
        yield unit;
        unit = [];
        used = 0;
      }
    }
  }
  if (unit.length > 0) yield unit;
}

/** Bytes that a plan reads. */
export function bytesToRead(plan: RangePlan): number {
  return totalLength(plan.read);
}
