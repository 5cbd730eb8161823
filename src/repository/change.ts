import type { IoOptions } from "../bytes/index.js";
import { NotFoundError } from "../errors/index.js";
import { StorageError, type Storage } from "../storage/index.js";
import { readManifestBytes, surveyMachine, type Survey } from "./catalogue.js";
import { FencedError, PointNeededError } from "./errors.js";
import { discardPoint } from "./garbage.js";
import { isHashesKey, machinePrefix, manifestKey, pointPrefix } from "./layout.js";
import { decodeManifest, encodeManifest } from "./manifest-codec.js";
import type { PointManifest } from "./manifest.js";
import { settle } from "./pending.js";

/** What changing a committed point needs. */
export interface ChangeOptions extends IoOptions {
  /** Throws when this run must not change anything any more, as `MachineLock.verify` does. */
  readonly fence: () => Promise<void>;
}

/**
 * Changes a committed point's manifest, in one atomic step.
 *
 * @param change makes the new manifest of the old one
 * @returns the new one
 * @throws {NotFoundError} when there is no such point
 * @throws {FencedError} when another run changed it meanwhile; that run's stays
 */
export async function changePoint(
  storage: Storage,
  machine: string,
  id: string,
  change: (manifest: PointManifest) => PointManifest | Promise<PointManifest>,
  options: ChangeOptions,
): Promise<PointManifest> {
  const before = await readManifestBytes(storage, machine, id, options);
  if (before === undefined) {
    throw new NotFoundError(
      "TM_POINT_NOT_FOUND",
      `Cannot change point ${id} of machine "${machine}": it is not there`,
    );
  }
  const changed = await change(decodeManifest(before, { machine, point: id }));
  const bytes = encodeManifest(changed);
  if (bytes.equals(before)) return changed;
  await replaceManifest(storage, { machine, id, before, bytes }, options);
  return changed;
}

/**
 * Puts a manifest in the place of another. It is begun before the lock is asked for: whoever takes the lock over from then on
 * removes what was begun (`finishRewrites`), so that a run that was suspended here does not go on with what it once read.
 */
async function replaceManifest(
  storage: Storage,
  {
    machine,
    id,
    before,
    bytes,
  }: { readonly machine: string; readonly id: string; readonly before: Buffer; readonly bytes: Buffer },
  options: ChangeOptions,
): Promise<void> {
  const { signal, fence } = options;
  const begun = await storage.create(manifestKey(machine, id), { headLength: bytes.length, signal });
  try {
    await fence();
    const now = await readManifestBytes(storage, machine, id, options);
    if (now?.equals(before) !== true) {
      throw new FencedError(`Cannot change point ${id} of machine "${machine}": it was changed meanwhile`);
    }
    await begun.commit(bytes);
  } catch (error) {
    await begun.abort();
    // What was begun may have been removed by who has the lock now: then that is what happened.
    if (error instanceof StorageError) await fence();
    throw error;
  }
  await fence();
}

/**
 * Completes what runs that died while they wrote images anew have left: each manifest says of its images what is
 * true, and hashes that belong to none are gone, as are files that were not finished.
 */
export async function finishRewrites(
  storage: Storage,
  machine: string,
  options: ChangeOptions,
): Promise<void> {
  const { points } = await surveyMachine(storage, machine, options);
  await options.fence();
  // Such a run may be alive after all, merely suspended: what it has begun must not take the place of what is written now.
  for (const { id } of points)
    await storage.discardLeftovers(pointPrefix(machine, id), { signal: options.signal });
  const settled = new Map<string, PointManifest>();
  for (const point of points) {
    const { id, pending } = point;
    settled.set(id, pending === undefined ? point : await settlePoint(storage, machine, id, options));
  }
  await removeStrayHashes(storage, machinePrefix(machine), (id) => settled.get(id), options);
}

/** Completes the rewriting of one point's images, as far as it has come. @returns its manifest, which has nothing pending */
export async function finishRewrite(
  storage: Storage,
  machine: string,
  id: string,
  options: ChangeOptions,
): Promise<PointManifest> {
  const finished = await settlePoint(storage, machine, id, options);
  await removeStrayHashes(storage, pointPrefix(machine, id), () => finished, options);
  return finished;
}

async function settlePoint(
  storage: Storage,
  machine: string,
  id: string,
  options: ChangeOptions,
): Promise<PointManifest> {
  return await changePoint(storage, machine, id, (point) => settle(storage, point, options), options);
}

/**
 * Removes hashes that the manifest of their point does not name: those of images that were written anew.
 *
 * @param find the manifest of a point, settled; undefined: that point's files are left alone
 */
async function removeStrayHashes(
  storage: Storage,
  prefix: string,
  find: (id: string) => PointManifest | undefined,
  options: ChangeOptions,
): Promise<void> {
  const stray: string[] = [];
  for await (const { key } of storage.list(prefix, options)) {
    const [, id = "", file = ""] = key.split("/");
    const point = isHashesKey(key) ? find(id) : undefined;
    if (point !== undefined && !point.disks.some(({ hashes }) => hashes?.file === file)) stray.push(key);
  }
  if (stray.length > 0) await options.fence();
  for (const key of stray) await storage.delete(key, options);
}

/**
 * Removes committed points, one after the other: each one's manifest, then its files. All manifests are read once, at the
 * beginning: nobody else changes any as long as `fence` does not throw.
 *
 * @param ids in an order in which none goes before those that need it
 * @param onRemoved told, and waited for, when a point is gone
 * @throws {PointNeededError} when an image of another point is, or may be, an increment of one of its; that one is not removed
 * @throws what `fence` throws, when the lock was lost meanwhile; a point that another run has continued is there again
 */
export async function removePoints(
  storage: Storage,
  machine: string,
  ids: readonly string[],
  options: ChangeOptions,
  onRemoved?: (id: string) => Promise<void> | undefined,
): Promise<void> {
  if (ids.length === 0) return;
  const survey = await surveyMachine(storage, machine, options);
  const gone = new Set<string>();
  for (const id of ids) {
    const needing = pointsNeeding(survey, id).filter((other) => !gone.has(other));
    if (needing.length > 0) throw new PointNeededError(machine, id, needing);
    await removePoint(storage, machine, id, options);
    gone.add(id);
    await onRemoved?.(id);
  }
}

async function removePoint(
  storage: Storage,
  machine: string,
  id: string,
  options: ChangeOptions,
): Promise<void> {
  const bytes = await readManifestBytes(storage, machine, id, options);
  await options.fence();
  await storage.delete(manifestKey(machine, id), options);
  try {
    await options.fence();
  } catch (error) {
    // Whoever took the lock over may have continued the point: it asks after its own commit whether the point is still there.
    const isNeeded = pointsNeeding(await surveyMachine(storage, machine), id).length > 0;
    if (isNeeded && bytes !== undefined)
      await storage.put(manifestKey(machine, id), bytes, { ifAbsent: true });
    throw error;
  }
  await discardPoint(storage, machine, id, options);
}

/** Ids of the points whose images are, or may be, increments of one of a point. */
function pointsNeeding({ points, unreadable }: Survey, id: string): string[] {
  const needing = points.filter(({ disks, pending = {} }) =>
    [...disks, ...Object.values(pending)].some(({ parent }) => parent === id),
  );
  const unknown = unreadable.filter((other) => other.id > id);
  return [...needing, ...unknown].map((point) => point.id).sort();
}
