import type { PointManifest } from "../repository/index.js";
import { changeChain, type ChainChanges } from "./changes.js";
import { planCompaction } from "./plan.js";
import { onChain, requirePoint, type ChangeChainOptions } from "./session.js";

/** Share of an image that may be garbage before it is worth writing anew, where nothing else is asked for. */
export const DEFAULT_GARBAGE_SHARE = 0.1;

export interface CompactOptions extends ChangeChainOptions {
  /** Id; default all points. */
  readonly point?: string | undefined;
  /** Images of which more than this share, 0 to 1, is garbage are written anew; default a tenth. */
  readonly share?: number | undefined;
}

/**
 * Writes images anew without the bytes that nothing refers to any more. Everything reads as before.
 *
 * @throws {NotFoundError} when there is no such point
 */
export async function compactPoints(options: CompactOptions): Promise<ChainChanges> {
  const { point: id, machine, share = DEFAULT_GARBAGE_SHARE, dryRun = false } = options;
  return await onChain(options, async (points, context) => {
    if (id !== undefined) requirePoint(points, id, machine);
    const wanted = points.filter((point: PointManifest) => id === undefined || point.id === id);
    const plan = {
      merges: planCompaction(wanted, share),
      reparented: new Map<string, string>(),
      removed: [],
    };
    return await changeChain({ plan, reason: "compacted", dryRun }, points, context);
  });
}
