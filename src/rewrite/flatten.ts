import { changeChain, type ChainChanges } from "./changes.js";
import { idleTombstones, planFlatten, planIdle } from "./plan.js";
import { onChain, requirePoint, type ChangeChainOptions } from "./session.js";

export interface FlattenOptions extends ChangeChainOptions {
  /** Id. */
  readonly point: string;
}

/**
 * Makes a point's images full, without the machine: a synthetic full. What it needs of the points before it is copied.
 *
 * @throws {NotFoundError} when there is no such point
 */
export async function flattenPoint(options: FlattenOptions): Promise<ChainChanges> {
  const { point: id, machine, dryRun = false } = options;
  return await onChain(options, async (points, context) => {
    requirePoint(points, id, machine);
    const merges = planFlatten(points, id);
    const idle = idleTombstones(points, new Set(), merges);
    const plan = planIdle(points, merges, idle);
    return await changeChain({ plan, reason: "flattened", dryRun }, points, context);
  });
}
