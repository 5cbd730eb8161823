import type { PointNode } from "../repository/index.js";

/** What planning needs to know of a point; a PointManifest is one. */
export interface PlannedPoint extends PointNode {
  readonly disks: readonly {
    readonly name: string;
    readonly token: string;
    readonly parent: string | null;
  }[];
}

/** An image that is to be written anew, so that it needs some of the images below it no more. */
export interface ImageMerge {
  /** The point whose image it is. */
  readonly point: string;
  readonly disk: string;
  readonly token: string;
  /** Points whose images become one: `point` first, each one's parent next. */
  readonly stack: readonly string[];
  /** The point that the image is an increment of afterwards; null: it is full. */
  readonly parent: string | null;
}

/** How points are removed without a loss for those that are kept. */
export interface RemovalPlan {
  /** Images of kept points that need images of removed ones. */
  readonly merges: readonly ImageMerge[];
  /** Kept points whose parent is removed, and the nearest kept one before it. */
  readonly reparented: ReadonlyMap<string, string | null>;
  /** In the order in which they can go, once all merges are done: no one goes before those that need it. */
  readonly removed: readonly string[];
}

/**
 * Plans the removal of points: all data that a kept point needs moves into its own images, at once, however many
 * points of its chain are removed. Where a chain branches, each branch gets it.
 *
 * @param points all of the machine's, in any order
 * @param removed ids
 */
export function planRemoval(points: readonly PlannedPoint[], removed: ReadonlySet<string>): RemovalPlan {
  const byId = new Map(points.map((point) => [point.id, point]));
  const merges: ImageMerge[] = [];
  const reparented = new Map<string, string | null>();
  for (const point of points) {
    if (removed.has(point.id)) continue;
    if (point.parent !== null && removed.has(point.parent)) {
      reparented.set(
        point.id,
        nearestKept(point.parent, (id) => byId.get(id)?.parent ?? null, removed),
      );
    }
    for (const { name, token, parent } of point.disks) {
      if (parent === null || !removed.has(parent)) continue;
      merges.push(mergeOf(point.id, name, token, byId, (id) => removed.has(id)));
    }
  }
  const gone = points.filter(({ id }) => removed.has(id)).map(({ id }) => id);
  return { merges, reparented, removed: gone.sort().reverse() };
}

/** Points that more than one image of the same disk is merged with, newest first: the first one is where they part. */
export function sharedPoints(merges: readonly ImageMerge[]): readonly string[] {
  const taken = new Set<string>();
  const shared = new Set<string>();
  for (const { stack, token } of merges) {
    for (const id of stack.slice(1)) {
      const image = `${id} ${token}`;
      if (taken.has(image)) shared.add(id);
      taken.add(image);
    }
  }
  return [...shared].sort().reverse();
}

/** Plans to make a point's images full: each is merged with all that is below it. Those that are full stay. */
export function planFlatten(points: readonly PlannedPoint[], id: string): readonly ImageMerge[] {
  const byId = new Map(points.map((point) => [point.id, point]));
  const disks = byId.get(id)?.disks ?? [];
  return disks
    .filter(({ parent }) => parent !== null)
    .map(({ name, token }) => mergeOf(id, name, token, byId, () => true));
}

/** The points that would be lost with `id`: those that were made after it, or whose images need one of its. It is not among them. */
export function descendantsOf(points: readonly PlannedPoint[], id: string): ReadonlySet<string> {
  const found = new Set([id]);
  // A child is younger than its parents: one pass from old to new sees these first.
  for (const point of [...points].sort((a, b) => (a.id < b.id ? -1 : 1))) {
    const parents = [point.parent, ...point.disks.map((disk) => disk.parent)];
    if (parents.some((parent) => parent !== null && found.has(parent))) found.add(point.id);
  }
  found.delete(id);
  return found;
}

/** What planning needs to know of a point to see what is garbage, or forgotten. */
export interface StoredPoint extends PlannedPoint {
  readonly tombstone?: boolean | undefined;
  readonly disks: readonly (PlannedPoint["disks"][number] & {
    readonly bytes: number;
    readonly garbageBytes: number;
  })[];
}

/** Plans to write images anew of which more than a share is garbage. @param share 0 to 1 */
export function planCompaction(points: readonly StoredPoint[], share: number): readonly ImageMerge[] {
  return points.flatMap(({ id, disks }) =>
    disks
      .filter(({ bytes, garbageBytes }) => garbageBytes > bytes * share)
      .map(({ name, token, parent }) => ({ point: id, disk: name, token, stack: [id], parent })),
  );
}

/**
 * Forgotten points that go by themselves: others needed their images, and nobody does any more.
 *
 * @param points all of the machine's
 * @param removed ids of those that go anyway
 * @param merges what is done before they go
 */
export function idleTombstones(
  points: readonly StoredPoint[],
  removed: ReadonlySet<string>,
  merges: readonly ImageMerge[],
): ReadonlySet<string> {
  const parents = new Map(merges.map(({ point, token, parent }) => [`${point} ${token}`, parent]));
  const needs = (point: StoredPoint, id: string, isAfter: boolean): boolean =>
    point.disks.some(({ token, parent }) => {
      const now = isAfter ? parents.get(`${point.id} ${token}`) : undefined;
      return (now === undefined ? parent : now) === id;
    });
  const idle = new Set<string>();
  // What needs a forgotten point is younger: one pass from new to old sees it first.
  for (const { id, tombstone } of [...points].sort((a, b) => (a.id < b.id ? 1 : -1))) {
    if (tombstone !== true || removed.has(id) || !points.some((point) => needs(point, id, false))) continue;
    const left = points.filter((point) => !removed.has(point.id) && !idle.has(point.id));
    if (!left.some((point) => needs(point, id, true))) idle.add(id);
  }
  return idle;
}

/** Plans merges after which forgotten points go that nobody needs any more: see `idleTombstones`. */
export function planIdle(
  points: readonly PlannedPoint[],
  merges: readonly ImageMerge[],
  idle: ReadonlySet<string>,
): RemovalPlan {
  const parents = new Map(merges.map(({ point, token, parent }) => [`${point} ${token}`, parent]));
  const merged = points.map((point) => ({
    ...point,
    disks: point.disks.map((disk) => {
      const parent = parents.get(`${point.id} ${disk.token}`);
      return parent === undefined ? disk : { ...disk, parent };
    }),
  }));
  return { ...planRemoval(merged, idle), merges };
}

/** Follows a disk's images down as long as they are to be merged. */
function mergeOf(
  point: string,
  disk: string,
  token: string,
  byId: ReadonlyMap<string, PlannedPoint>,
  isMerged: (id: string) => boolean,
): ImageMerge {
  const parentOf = (id: string): string | null =>
    byId.get(id)?.disks.find((candidate) => candidate.token === token)?.parent ?? null;
  const stack = [point];
  let parent = parentOf(point);
  while (parent !== null && isMerged(parent) && !stack.includes(parent)) {
    stack.push(parent);
    parent = parentOf(parent);
  }
  return { point, disk, token, stack, parent };
}

function nearestKept(
  start: string,
  parentOf: (id: string) => string | null,
  removed: ReadonlySet<string>,
): string | null {
  const seen = new Set<string>();
  let id: string | null = start;
  while (id !== null && removed.has(id) && !seen.has(id)) {
    seen.add(id);
    id = parentOf(id);
  }
  return id;
}
