import { standingPoints } from "../repository/index.js";
import { planRetention, type RetentionPolicy } from "../retention/index.js";
import { pointsToForget } from "./branches.js";
import { changeChain, type ChainChanges } from "./changes.js";
import { MOST_GARBAGE } from "./measure.js";
import { planCompaction, planRemoval } from "./plan.js";
import { onChain, type ChangeChainOptions } from "./session.js";

export interface PruneOptions extends ChangeChainOptions {
  readonly policy: RetentionPolicy;
  /** What ages are counted from. */
  readonly now: Date;
  /** IANA name of the calendar's time zone. */
  readonly timeZone: string;
}

/**
 * Thins a machine's points out by retention rules. All that goes is planned at once, so that each image that has to be
 * written anew is written once. Images of which more than a third is garbage are written anew, too.
 * A point that several others would take copies of is only forgotten, where that takes less room.
 *
 * @throws {UsageError} for a policy without rules
 */
export async function prunePoints(options: PruneOptions): Promise<ChainChanges> {
  const { policy, now, timeZone, dryRun = false } = options;
  return await onChain(options, async (points, context) => {
    const standing = standingPoints(points);
    const verdicts = planRetention(standing, policy, { now, timeZone });
    const kept = verdicts.filter(({ reasons }) => reasons.length > 0);
    // What was forgotten before, and is held only by those that need its images, goes as well.
    const ids = new Set(points.map(({ id }) => id));
    for (const { id } of kept) ids.delete(id);
    const forgotten = await pointsToForget(points, ids, context);
    for (const id of forgotten) ids.delete(id);
    const plan = planRemoval(points, ids);
    const touched = new Set(plan.merges.map(({ point }) => point));
    const others = points.filter(({ id }) => !ids.has(id) && !touched.has(id));
    const merges = [...plan.merges, ...planCompaction(others, MOST_GARBAGE)];
    const reason = "the points before it were pruned";
    const change = { plan: { ...plan, merges }, forgotten, reason, dryRun };
    const changes = await changeChain(change, points, context);
    return { ...changes, kept };
  });
}
