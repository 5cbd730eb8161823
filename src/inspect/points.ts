import {
  currentPoint,
  diskChain,
  sortPoints,
  standingPoints,
  type PointManifest,
  type Survey,
} from "../repository/index.js";

/** What a line of the tree stands for. */
export type PointState =
  | "standing"
  /** A tombstone: it cannot be named any more, and stays for the images of others. */
  | "forgotten"
  /** Its manifest is there, but cannot be read. */
  | "unreadable"
  /** Others need its images, but it is not there. */
  | "missing";

/** A point as `list` shows it: a line of the tree. */
export interface PointLine {
  readonly id: string;
  readonly state: PointState;
  /** undefined where there is no manifest that can be read. */
  readonly point: PointManifest | undefined;
  /** The newest of its machine that can be named. */
  readonly current: boolean;
  /** How many branches lie between it and the trunk. */
  readonly depth: number;
  /** How it hangs together with the lines before: it begins a tree, it begins a branch, or it follows its parent. */
  readonly link: "root" | "branch" | "trunk";
  /** Ids of the points without which it cannot be restored, and that cannot be read or are not there. */
  readonly lacks: readonly string[];
}

interface Node {
  readonly id: string;
  readonly state: PointState;
  readonly point: PointManifest | undefined;
  readonly lacks: readonly string[];
  /** Oldest first. */
  readonly children: Node[];
}

/**
 * The points of one machine, as trees in reading order: a branch stands behind the point that it leaves, and is read to
 * its end before the line goes on. Points that cannot be read, and those that are missing, stand where their children need them.
 */
export function pointTree({ points, unreadable }: Pick<Survey, "points" | "unreadable">): PointLine[] {
  const nodes = nodesOf(points, unreadable);
  const roots = sortPoints(points).flatMap(({ id, parent }) => {
    const above = parent === null ? undefined : nodes.get(parent);
    const node = nodes.get(id);
    if (node === undefined) return [];
    above?.children.push(node);
    return above === undefined ? [node] : [];
  });
  const strangers = [...nodes.values()].filter(({ point }) => point === undefined);
  const current = currentPoint(standingPoints(points))?.id;
  const lines: PointLine[] = [];
  // A stack and no recursion: a chain can be thousands of points long.
  const waiting: { node: Node; depth: number; link: PointLine["link"] }[] = sortNodes([
    ...roots,
    ...strangers,
  ])
    .map((node) => ({ node, depth: 0, link: "root" as const }))
    .reverse();
  for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
    const { node, depth, link } = next;
    const { children, ...shown } = node;
    lines.push({ ...shown, depth, link, current: node.id === current });
    // The newest child goes on with the line; older ones are branches that were left.
    const [trunk, ...branches] = children.toReversed();
    if (trunk !== undefined) waiting.push({ node: trunk, depth, link: "trunk" });
    for (const branch of branches) waiting.push({ node: branch, depth: depth + 1, link: "branch" });
  }
  return lines;
}

/** All points, and those that they name as parents of their images and that cannot be read, by their ids. */
function nodesOf(points: Survey["points"], unreadable: Survey["unreadable"]): Map<string, Node> {
  const nodes = new Map<string, Node>();
  const stranger = (id: string, state: PointState): void => {
    nodes.set(id, { id, state, point: undefined, lacks: [id], children: [] });
  };
  for (const { id } of unreadable) stranger(id, "unreadable");
  const known = new Set([...points, ...unreadable].map(({ id }) => id));
  const lacking = new Map<string, string>();
  // A parent is older than its child: from old to new, what it lacks is known already.
  for (const point of sortPoints(points)) {
    const lacks = new Set<string>();
    for (const { token, parent } of point.disks) {
      if (parent === null) continue;
      if (!known.has(parent)) stranger(parent, "missing");
      const isReadable = nodes.get(parent)?.point?.disks.some((disk) => disk.token === token) === true;
      const lack = isReadable ? lacking.get(`${parent}/${token}`) : parent;
      if (lack === undefined) continue;
      lacking.set(`${point.id}/${token}`, lack);
      lacks.add(lack);
    }
    const state = point.tombstone === true ? "forgotten" : "standing";
    nodes.set(point.id, { id: point.id, state, point, lacks: [...lacks].sort(), children: [] });
  }
  return nodes;
}

function sortNodes(nodes: readonly Node[]): Node[] {
  return nodes.toSorted((a, b) => (a.id < b.id ? -1 : 1));
}

/** The ids from a point down to the full image, over all its disks; newest first. */
export function chainOf(points: readonly PointManifest[], point: PointManifest): string[] {
  const ids = point.disks.flatMap(({ token }) => diskChain(points, point.id, token).map(({ id }) => id));
  return [...new Set(ids)].sort().reverse();
}
