import type { PointManifest } from "../repository/index.js";

/** Something that is not what was stored. */
export interface Problem {
  /** Id. */
  readonly point: string;
  /** Name of the disk; null where the whole point is concerned. */
  readonly disk: string | null;
  /** What is wrong, for people. */
  readonly problem: string;
  /** Ids of the points that cannot be restored because of it, oldest first; none where only later backups suffer. */
  readonly affects: readonly string[];
}

/** The points that need any image of a point, oldest first, itself included: a manifest that cannot be read does not say which disks it held. */
export function dependentsOfPoint(points: readonly PointManifest[], id: string): string[] {
  const needing = new Set([id]);
  // A child is younger than its parent: one pass from old to new sees every parent first.
  for (const point of points) {
    if (point.disks.some(({ parent }) => parent !== null && needing.has(parent))) needing.add(point.id);
  }
  return [...needing].sort();
}
