import type { Survey } from "../repository/index.js";

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
