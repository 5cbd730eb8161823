import { isDeepStrictEqual } from "node:util";
import type { IoOptions } from "../bytes/index.js";
import { DamageError, NotFoundError } from "../errors/index.js";
import { anySignal } from "../flow/index.js";
import { currentPoint, standingPoints, type PointManifest, type Repository } from "../repository/index.js";
import { Movement, type MovementOptions } from "./movement.js";
import type { RewriteContext } from "./stack.js";

/** zstd level of the few clusters that are written anew. */
const LEVEL = 3;
/** How often a dry run looks at a chain that others change meanwhile. */
const ATTEMPTS = 4;

/** What every change of a chain needs to know. */
export interface ChangeChainOptions extends MovementOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  /** Only say what would be done. */
  readonly dryRun?: boolean | undefined;
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
  const context = { repository, machine, level: LEVEL };
  if (dryRun) return await lookAt(repository, machine, { signal }, work);
  await using lock = await repository.lockMachine(machine, { signal });
  const io = { signal: anySignal(signal, lock.lost) };
  const fence = (): Promise<void> => lock.verify(io);
  await repository.finishRewrites(machine, { fence, ...io });
  await repository.collectGarbage(machine, lock, io);
  const points = await allPoints(repository, machine, io.signal);
  const { bandwidth, observer } = options;
  return await work(points, {
    ...context,
    fence,
    movement: new Movement({ bandwidth, observer, ...io }),
    ...io,
  });
}

/** A dry run keeps nobody from changing the chain: what it finds counts only if that stayed as it was, or else it looks again. */
async function lookAt<T>(
  repository: Repository,
  machine: string,
  { signal }: IoOptions,
  work: (points: readonly PointManifest[], context: RewriteContext) => Promise<T>,
): Promise<T> {
  const context = { repository, machine, level: LEVEL, signal, fence: () => Promise.resolve() };
  let points = await allPoints(repository, machine, signal);
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await work(points, context);
    } catch (error) {
      signal?.throwIfAborted();
      const now = await allPoints(repository, machine, signal);
      if (attempt === ATTEMPTS || isDeepStrictEqual(now, points)) throw error;
      points = now;
    }
  }
}

/** All points of a machine, tombstones included. @throws {DamageError} with a hint when one cannot be read */
async function allPoints(
  repository: Repository,
  machine: string,
  signal: AbortSignal | undefined,
): Promise<readonly PointManifest[]> {
  try {
    return await repository.settledPoints(machine, { signal });
  } catch (error) {
    if (!(error instanceof DamageError) || error.hint !== undefined) throw error;
    const folder = error.damage.object.replace(/\/[^/]*$/, "");
    const hint =
      `What that point needs is not known: bring the file back from a copy. If there is none, remove its folder ${folder}; ` +
      `then tidemark verify ${machine} --quick names the points that are lost with it`;
    throw new DamageError(error.code, error.message, error.damage, { cause: error, hint });
  }
}

/** @throws {NotFoundError} when there is no such point */
export function requirePoint(points: readonly PointManifest[], id: string, machine: string): void {
  if (points.some((point) => point.id === id)) return;
  throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find point ${id} of machine "${machine}"`);
}

/** Whether the newest point, which the next backup would continue, is among some. */
export function includesCurrent(points: readonly PointManifest[], ids: ReadonlySet<string>): boolean {
  const current = currentPoint(standingPoints(points));
  return current !== undefined && ids.has(current.id);
}
