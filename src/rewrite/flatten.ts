import { planFlatten } from "./plan.js";
import { rewriteImages } from "./run.js";
import { requirePoint, estimate, onChain, type ChainChanges, type ChangeChainOptions } from "./session.js";

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
    const rewritten = dryRun
      ? await estimate(merges, context)
      : await rewriteImages(merges, "flattened", context);
    return { dryRun, removed: [], rewritten, kept: [] };
  });
}
