import { roundDown, roundUp } from "../bytes/index.js";

/** A range of bytes of a disk. Lists of extents are sorted, disjoint and not touching, unless said otherwise. */
export interface Extent {
  readonly offset: number;
  readonly length: number;
}

/** End of an extent: the offset of the first byte behind it. */
export function endOf(extent: Extent): number {
  return extent.offset + extent.length;
}

/** Bytes in all. */
export function totalLength(extents: readonly Extent[]): number {
  return extents.reduce((sum, extent) => sum + extent.length, 0);
}

/** Sorts, joins what overlaps or touches, and drops what is empty: the canonical form of any list. */
export function normalize(extents: readonly Extent[]): Extent[] {
  const sorted = extents.filter((extent) => extent.length > 0).sort((a, b) => a.offset - b.offset);
  const result: { offset: number; length: number }[] = [];
  for (const extent of sorted) {
    const last = result.at(-1);
    if (last !== undefined && extent.offset <= endOf(last)) {
      last.length = Math.max(endOf(last), endOf(extent)) - last.offset;
    } else {
      result.push({ offset: extent.offset, length: extent.length });
    }
  }
  return result;
}

/** Bytes that are in `a` or in `b`. */
export function union(a: readonly Extent[], b: readonly Extent[]): Extent[] {
  return normalize([...a, ...b]);
}

/** Bytes that are in `a` and in `b`. */
export function intersect(a: readonly Extent[], b: readonly Extent[]): Extent[] {
  const result: Extent[] = [];
  let i = 0;
  let j = 0;
  for (let x = a[i], y = b[j]; x !== undefined && y !== undefined; x = a[i], y = b[j]) {
    const offset = Math.max(x.offset, y.offset);
    const end = Math.min(endOf(x), endOf(y));
    if (end > offset) result.push({ offset, length: end - offset });
    if (endOf(x) < endOf(y)) i += 1;
    else j += 1;
  }
  return result;
}

/** Bytes that are in `a` and not in `b`. */
export function subtract(a: readonly Extent[], b: readonly Extent[]): Extent[] {
  const result: Extent[] = [];
  let j = 0;
  for (const extent of a) {
    let offset = extent.offset;
    while (j > 0 && endOf(b[j - 1] ?? extent) > offset) j -= 1;
    for (let hole = b[j]; hole !== undefined && hole.offset < endOf(extent); hole = b[(j += 1)]) {
      if (hole.offset > offset) result.push({ offset, length: hole.offset - offset });
      offset = Math.max(offset, endOf(hole));
    }
    if (offset < endOf(extent)) result.push({ offset, length: endOf(extent) - offset });
  }
  return result;
}

/** Widens each extent to whole clusters, the last one ending no later than `size`, the disk's size. */
export function widen(extents: readonly Extent[], clusterSize: number, size: number): Extent[] {
  return normalize(
    extents.map((extent) => {
      const offset = roundDown(extent.offset, clusterSize);
      return { offset, length: Math.min(roundUp(endOf(extent), clusterSize), size) - offset };
    }),
  );
}

/** Cuts a sorted list into extents of at most `length` bytes each, keeping their order. */
export function* chop(extents: Iterable<Extent>, length: number): Generator<Extent> {
  for (const extent of extents) {
    for (let offset = extent.offset; offset < endOf(extent); offset += length) {
      yield { offset, length: Math.min(length, endOf(extent) - offset) };
    }
  }
}
