import { childrenOf, currentPoint, diskChain, rootsOf, type PointManifest } from "../repository/index.js";

/** A point as `list` shows it: a line of the tree. */
export interface PointLine {
  readonly point: PointManifest;
  /** The newest of its machine. */
  readonly current: boolean;
  /** How many branches lie between it and the trunk. */
  readonly depth: number;
}

/** The points of one machine, as a tree in reading order: a branch stands behind the point that it leaves. */
export function pointTree(points: readonly PointManifest[]): PointLine[] {
  const current = currentPoint(points);
  const lines: PointLine[] = [];
  // A stack and no recursion: a chain can be thousands of points long.
  const waiting = rootsOf(points)
    .map((point) => ({ point, depth: 0 }))
    .reverse();
  for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
    const { point, depth } = next;
    lines.push({ point, depth, current: point === current });
    // The newest child goes on with the line; older ones are branches that were left.
    const [trunk, ...branches] = childrenOf(points, point.id).reverse();
    if (trunk !== undefined) waiting.push({ point: trunk, depth });
    for (const branch of branches) waiting.push({ point: branch, depth: depth + 1 });
  }
  return lines;
}

/** The ids from a point down to the full image, over all its disks; newest first. */
export function chainOf(points: readonly PointManifest[], point: PointManifest): string[] {
  const ids = point.disks.flatMap(({ token }) => diskChain(points, point.id, token).map(({ id }) => id));
  return [...new Set(ids)].sort().reverse();
}
