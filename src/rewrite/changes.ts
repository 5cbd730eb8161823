import { standingPoints, storedBytesOf, type PointManifest } from "../repository/index.js";
import { measureRewrites, type MeasuredMerge } from "./measure.js";
import type { RemovalPlan } from "./plan.js";
import { removePoints } from "./run.js";
import type { RewriteContext, RewrittenImage } from "./stack.js";

/** What was done to a chain, or would be. */
export interface ChainChanges {
  readonly dryRun: boolean;
  /** Ids of removed points, oldest first. */
  readonly removed: readonly string[];
  /** Those among them that were only forgotten: others need their images, which stay. */
  readonly forgotten: readonly string[];
  /** Images that were written anew; of a dry run, estimates. */
  readonly rewritten: readonly RewrittenImage[];
  /** Bytes of images and hashes that the repository has less of, blocks that are shared not considered; negative when it grew. */
  readonly freedBytes: number;
  /** Points that are kept by rules, and by which. */
  readonly kept: readonly { readonly id: string; readonly reasons: readonly string[] }[];
}

/** What is to be done to a chain. */
export interface ChainChange {
  readonly plan: RemovalPlan;
  /** Ids of points that become tombstones; those that are ones already stay it. */
  readonly forgotten?: ReadonlySet<string> | undefined;
  /** Why an image is full that was not, for people. */
  readonly reason: string;
  /** Only find out what it would be. */
  readonly dryRun: boolean;
}

/** Changes a chain as planned. @param points all of the machine's, as they are */
export async function changeChain(
  { plan, forgotten: tombstones, reason, dryRun }: ChainChange,
  points: readonly PointManifest[],
  context: RewriteContext,
): Promise<ChainChanges> {
  const { repository, machine, signal } = context;
  const forgotten = standingPoints(points)
    .map(({ id }) => id)
    .filter((id) => tombstones?.has(id));
  const removed = [...plan.removed, ...forgotten].sort();
  const before = storedBytesOf(points);
  const facts = { dryRun, removed, forgotten, kept: [] };
  if (dryRun) {
    const measured = await measureRewrites(plan.merges, context);
    const freedBytes = before - expectedBytes(points, new Set(plan.removed), measured);
    return { ...facts, rewritten: measured.map(({ expected }) => expected), freedBytes };
  }
  const rewritten = await removePoints(plan, reason, context);
  for (const id of forgotten)
    await repository.changePoint(machine, id, (point) => ({ ...point, tombstone: true }), context);
  const isIdle = rewritten.length + removed.length === 0;
  const after = isIdle ? before : storedBytesOf(await repository.points(machine, { signal }));
  return { ...facts, rewritten, freedBytes: before - after };
}

/** Stored bytes of the points once some are removed, and images written anew. */
function expectedBytes(
  points: readonly PointManifest[],
  removed: ReadonlySet<string>,
  measured: readonly MeasuredMerge[],
): number {
  const anew = new Map(measured.map((item) => [`${item.merge.point} ${item.merge.token}`, item]));
  return points
    .filter(({ id }) => !removed.has(id))
    .flatMap(({ id, disks }) =>
      disks.map(({ token, bytes, hashes }) => {
        const item = anew.get(`${id} ${token}`);
        if (item === undefined) return bytes + (hashes?.bytes ?? 0);
        return item.expected.baseBytes + item.expected.writtenBytes + item.hashesBytes;
      }),
    )
    .reduce((sum, bytes) => sum + bytes, 0);
}
