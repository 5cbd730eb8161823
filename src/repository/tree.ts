/**
 * Points as a tree: pure functions over the points of one machine. Points are linked twice: the point to
 * the one before it, and each disk's image to the image that it is an increment of.
 */

/** What the tree needs to know of a point; a PointManifest is one. */
export interface PointNode {
  readonly id: string;
  readonly parent: string | null;
  readonly disks: readonly { readonly token: string; readonly parent: string | null }[];
}

/** The points that can be named: those that were forgotten stay only for the images of others. */
export function standingPoints<P extends { readonly tombstone?: boolean | undefined }>(
  points: readonly P[],
): P[] {
  return points.filter(({ tombstone }) => tombstone !== true);
}

/** Oldest first: ids are sortable as text. */
export function sortPoints<P extends PointNode>(points: Iterable<P>): P[] {
  return [...points].sort((a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0));
}

/** The newest point, whatever its branch; undefined when there is none. */
export function currentPoint<P extends PointNode>(points: Iterable<P>): P | undefined {
  return sortPoints(points).at(-1);
}

/** Points without a parent among `points`, oldest first. */
export function rootsOf<P extends PointNode>(points: readonly P[]): P[] {
  const ids = new Set(points.map((point) => point.id));
  return sortPoints(points.filter(({ parent }) => parent === null || !ids.has(parent)));
}

/** Points made right after the point `id`, oldest first: more than one where a chain branches. */
export function childrenOf<P extends PointNode>(points: readonly P[], id: string): P[] {
  return sortPoints(points.filter((point) => point.parent === id));
}

/**
 * The points whose images make up a disk at the point `id`: that point first, the one with the full image last.
 * Ends early where a point is missing from `points`.
 */
export function diskChain<P extends PointNode>(points: readonly P[], id: string, token: string): P[] {
  const byId = new Map(points.map((point) => [point.id, point]));
  const chain: P[] = [];
  const seen = new Set<string>();
  for (let next: string | null = id; next !== null && !seen.has(next);) {
    seen.add(next);
    const point = byId.get(next);
    const disk = point?.disks.find((candidate) => candidate.token === token);
    if (point === undefined || disk === undefined) break;
    chain.push(point);
    next = disk.parent;
  }
  return chain;
}

/** The points that any disk of the point `id` needs, newest first, itself included. */
export function pointChain<P extends PointNode>(points: readonly P[], id: string): P[] {
  const point = points.find((candidate) => candidate.id === id);
  const needed = point?.disks.flatMap((disk) => diskChain(points, id, disk.token)) ?? [];
  return sortPoints(new Set(needed)).reverse();
}

/** The points that need the image which point `id` holds of a disk, oldest first, itself included. */
export function dependentsOf<P extends PointNode>(points: readonly P[], id: string, token: string): P[] {
  const needing = new Set([id]);
  // A child is younger than its parent, so one pass from old to new sees every parent first.
  return sortPoints(points).filter((point) => {
    const disk = point.disks.find((candidate) => candidate.token === token);
    const needs = point.id === id || (disk?.parent != null && needing.has(disk.parent));
    if (needs && disk !== undefined) needing.add(point.id);
    return needs;
  });
}
