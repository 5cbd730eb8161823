import type { IoOptions } from "../bytes/index.js";
import { NotFoundError } from "../errors/index.js";
import { anySignal } from "../flow/index.js";
import { currentPoint, standingPoints, type PointManifest, type Repository } from "../repository/index.js";
import type { ImageMerge } from "./plan.js";
import { estimateRewrite, type RewriteContext, type RewrittenImage } from "./rewrite-image.js";

/** zstd level of the few clusters that are written anew. */
const LEVEL = 3;

/** What every change of a chain needs to know. */
export interface ChangeChainOptions extends IoOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  /** Only say what would be done. */
  readonly dryRun?: boolean | undefined;
}

/** What was done to a chain, or would be. */
export interface ChainChanges {
  readonly dryRun: boolean;
  /** Ids of removed points, oldest first. */
  readonly removed: readonly string[];
  /** Images that were written anew; of a dry run, estimates. */
  readonly rewritten: readonly RewrittenImage[];
  /** Points that are kept by rules, and by which. */
  readonly kept: readonly { readonly id: string; readonly reasons: readonly string[] }[];
}

/**
 * Works on a machine's chain as the only one: with its lock, once all that dead runs left is in order. A dry run only
 * looks.
 *
 * @throws {LockedError} when another run has the machine's points
 * @throws {DamageError} when a manifest cannot be read: nobody can tell then what it needs
 */
export async function onChain<T>(
  options: ChangeChainOptions,
  work: (points: readonly PointManifest[], context: RewriteContext) => Promise<T>,
): Promise<T> {
  const { repository, machine, dryRun = false, signal } = options;
  if (dryRun) {
    const points = await repository.points(machine, { signal });
    return await work(points, { repository, machine, level: LEVEL, signal, fence: () => Promise.resolve() });
  }
  await using lock = await repository.lockMachine(machine, { signal });
  const io = { signal: anySignal(signal, lock.lost) };
  const fence = (): Promise<void> => lock.verify(io);
  await repository.finishRewrites(machine, { fence, ...io });
  await repository.collectGarbage(machine, lock, io);
  const points = await repository.points(machine, io);
  return await work(points, { repository, machine, level: LEVEL, fence, ...io });
}

/** @throws {NotFoundError} when there is no such point */
export function requirePoint(points: readonly PointManifest[], id: string, machine: string): void {
  if (points.some((point) => point.id === id)) return;
  throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find point ${id} of machine "${machine}"`);
}

/** What writing images anew would move. */
export async function estimate(
  merges: readonly ImageMerge[],
  context: RewriteContext,
): Promise<RewrittenImage[]> {
  const estimates: RewrittenImage[] = [];
  for (const merge of merges) estimates.push(await estimateRewrite(merge, context));
  return estimates;
}

/** Whether the newest point, which the next backup would continue, is among some. */
export function includesCurrent(points: readonly PointManifest[], ids: ReadonlySet<string>): boolean {
  const current = currentPoint(standingPoints(points));
  return current !== undefined && ids.has(current.id);
}
