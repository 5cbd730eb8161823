import { UsageError } from "../errors/index.js";
import type { PointManifest } from "../repository/index.js";
import { changeChain, type ChainChanges } from "./changes.js";
import { descendantsOf, idleTombstones, planRemoval } from "./plan.js";
import { includesCurrent, onChain, requirePoint, type ChangeChainOptions } from "./session.js";

/** What goes with a point. */
export const DELETE_SCOPES = ["point", "children", "children-only", "metadata-only"] as const;
export type DeleteScope = (typeof DELETE_SCOPES)[number];

export interface DeleteOptions extends ChangeChainOptions {
  /** Id. */
  readonly point: string;
  /**
   * `point` (default): it alone, its data moves into its children. `children`: its subtree. `children-only`: the subtree
   * without the point. `metadata-only`: it is forgotten, its images stay where they are, for those that need them.
   */
  readonly scope?: DeleteScope | undefined;
  /** Also if the current point goes. */
  readonly force?: boolean | undefined;
}

/**
 * Forgets a point in time, and never a change that was made since: what other points need of it moves there first.
 *
 * @throws {NotFoundError} when there is no such point
 * @throws {UsageError} when the current point would go, unless that is wanted
 */
export async function deletePoint(options: DeleteOptions): Promise<ChainChanges> {
  const { point: id, scope = "point", dryRun = false } = options;
  return await onChain(options, async (points, context) => {
    requirePoint(points, id, options.machine);
    const ids = chosen(points, id, scope);
    if (options.force !== true && includesCurrent(points, ids))
      throw wouldLoseCurrent(options.machine, scope);
    if (scope === "metadata-only") {
      const plan = planRemoval(points, new Set());
      return await changeChain({ plan, forgotten: ids, reason: "", dryRun }, points, context);
    }
    const { merges } = planRemoval(points, ids);
    const plan = planRemoval(points, new Set([...ids, ...idleTombstones(points, ids, merges)]));
    const reason = ids.size === 1 ? `point ${id} was deleted` : "the points before it were deleted";
    return await changeChain({ plan, reason, dryRun }, points, context);
  });
}

function chosen(points: readonly PointManifest[], id: string, scope: DeleteScope): ReadonlySet<string> {
  if (scope === "point" || scope === "metadata-only") return new Set([id]);
  const below = descendantsOf(points, id);
  return scope === "children" ? new Set([id, ...below]) : below;
}

function wouldLoseCurrent(machine: string, scope: DeleteScope): UsageError {
  const why =
    scope === "metadata-only"
      ? "it could not be restored any more, though the next backup would still continue its images"
      : "the next backup could not continue it, and would start from an older checkpoint that is kept, or read and compare everything, or be full";
  return new UsageError(`Cannot delete the current point of machine "${machine}": ${why}`, {
    hint: "Give --force to delete it all the same",
  });
}
