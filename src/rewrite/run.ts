import { step } from "../flow/index.js";
import type { ImageMerge, RemovalPlan } from "./plan.js";
import { rewriteImage, type RewriteContext, type RewrittenImage } from "./rewrite-image.js";

/**
 * Writes images anew, one after the other, each of which holds from the moment at which it takes its place.
 *
 * @param reason why an image is full that was not, for people
 */
export async function rewriteImages(
  merges: readonly ImageMerge[],
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage[]> {
  const rewritten: RewrittenImage[] = [];
  for (const merge of merges) rewritten.push(await rewriteImage(merge, reason, context));
  return rewritten;
}

/**
 * Removes points, after what others need of them has moved there. A run that dies on the way has removed nothing that
 * is needed: all points that are still there read as before, and the removal can be asked for again.
 */
export async function removePoints(
  plan: RemovalPlan,
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage[]> {
  const { repository, machine } = context;
  const rewritten = await rewriteImages(plan.merges, reason, context);
  for (const [id, parent] of plan.reparented) {
    await repository.changePoint(machine, id, (point) => ({ ...point, parent }), context);
  }
  await step("points rewritten");
  for (const id of plan.removed) {
    await repository.removePoint(machine, id, context);
    await step("point removed");
  }
  return rewritten;
}
