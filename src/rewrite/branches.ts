import type { PointManifest } from "../repository/index.js";
import { measureRewrites } from "./measure.js";
import { planRemoval, sharedPoints } from "./plan.js";
import type { RewriteContext } from "./stack.js";

/**
 * Which of some points had better stay as tombstones: those that several kept ones would each take a copy of, where the copies
 * are more than goes with the point. A full with a differential for each day would be copied for every day that is kept.
 *
 * @param removed ids of those that are to go
 * @returns ids of those among them that stay
 */
export async function pointsToForget(
  points: readonly PointManifest[],
  removed: ReadonlySet<string>,
  context: RewriteContext,
): Promise<ReadonlySet<string>> {
  const byId = new Map(points.map((point) => [point.id, point]));
  const staying = new Set<string>();
  for (;;) {
    const going = new Set([...removed].filter((id) => !staying.has(id)));
    const { merges } = planRemoval(points, going);
    const shared = sharedPoints(merges);
    const [first] = shared;
    if (first === undefined) return staying;
    const measured = await measureRewrites(
      merges.filter(({ stack }) => stack.some((id) => shared.includes(id))),
      context,
    );
    const growing = shared.find((id) => {
      const taken = measured.reduce(
        (sum, { merge, frameBytes }) => sum + (frameBytes[merge.stack.indexOf(id)] ?? 0),
        0,
      );
      return taken > (byId.get(id)?.disks.reduce((sum, { bytes }) => sum + bytes, 0) ?? 0);
    });
    if (growing === undefined) return staying;
    staying.add(growing);
  }
}
