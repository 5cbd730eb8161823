import { step } from "../flow/index.js";
import { measureRewrites } from "./measure.js";
import type { ImageMerge, RemovalPlan } from "./plan.js";
import { rewriteImage } from "./rewrite-image.js";
import type { RewriteContext, RewrittenImage } from "./stack.js";

/**
 * Writes images anew, one after the other, each of which holds from the moment at which it takes its place. All are looked
 * at first: what cannot be read ends it before anything was changed.
 *
 * @param reason why an image is full that was not, for people
 */
export async function rewriteImages(
  merges: readonly ImageMerge[],
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage[]> {
  const measured = await measureRewrites(merges, context);
  context.movement?.begin(
    measured.reduce((sum, { expected }) => sum + expected.copiedBytes + expected.baseBytes, 0),
  );
  const rewritten: RewrittenImage[] = [];
  for (const merge of measured) rewritten.push(await rewriteImage(merge, reason, context));
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
  await repository.removePoints(machine, plan.removed, context, () => step("point removed"));
  return rewritten;
}
