/**
 * Rewriting a chain: points are removed and images made full, and every point that is kept reads as before.
 *
 * - merge: an image and some below it become one, which reads like the topmost of them.
 * - stack: the images that are merged, the topmost first. One alone is written anew without its garbage.
 */
export {
  descendantsOf,
  planFlatten,
  planRemoval,
  type ImageMerge,
  type PlannedPoint,
  type RemovalPlan,
} from "./plan.js";
export { compactPoints, type CompactOptions, DEFAULT_GARBAGE_SHARE } from "./compact.js";
export type { RewriteObserver } from "./movement.js";
export type { RewriteContext, RewrittenImage } from "./stack.js";
export { removePoints, rewriteImages } from "./run.js";
export { DELETE_SCOPES, deletePoint, type DeleteOptions, type DeleteScope } from "./delete.js";
export { flattenPoint, type FlattenOptions } from "./flatten.js";
export { prunePoints, type PruneOptions } from "./prune.js";
export type { ChainChanges } from "./changes.js";
export type { ChangeChainOptions } from "./session.js";
export { editPoint, type EditOptions } from "./edit.js";
