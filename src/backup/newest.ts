import type { PointManifest, Survey } from "../repository/index.js";
import type { DiskPlan } from "./disk-plan.js";

/**
 * The newest id of a machine's points: the next one's is greater, whatever the clock says. Points that cannot be read
 * have a place in time, too.
 */
export function newestIdOf({
  points,
  unreadable,
}: Pick<Survey, "points" | "unreadable">): string | undefined {
  return [...points, ...unreadable]
    .map(({ id }) => id)
    .sort()
    .at(-1);
}

/**
 * The point that a new one comes after: the newest whose checkpoint a disk carries, or that one is compared with. On a
 * branch that need not be the machine's newest, which it is where no disk tells.
 *
 * @param points oldest first
 */
export function precedingPoint<P extends Pick<PointManifest, "id">>(
  plans: readonly Pick<DiskPlan, "continues">[],
  points: readonly P[],
): P | undefined {
  const continued = new Set(plans.flatMap(({ continues }) => continues ?? []));
  return points.findLast(({ id }) => continued.has(id)) ?? points.at(-1);
}
