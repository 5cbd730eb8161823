import type { IoOptions } from "../bytes/index.js";
import { NotFoundError } from "../errors/index.js";
import type { Storage } from "../storage/index.js";
import { readManifestBytes, surveyMachine } from "./catalogue.js";
import { FencedError, PointNeededError } from "./errors.js";
import { discardPoint } from "./garbage.js";
import { hashesKey, isHashesKey, manifestKey, pointPrefix } from "./layout.js";
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
  change: (manifest: PointManifest) => PointManifest,
  options: ChangeOptions,
): Promise<PointManifest> {
  const before = await readManifestBytes(storage, machine, id, options);
  if (before === undefined) {
    throw new NotFoundError(
      "TM_POINT_NOT_FOUND",
      `Cannot change point ${id} of machine "${machine}": it is not there`,
    );
  }
  const changed = change(decodeManifest(before, { machine, point: id }));
  const bytes = encodeManifest(changed);
  if (bytes.equals(before)) return changed;
  await options.fence();
  const now = await readManifestBytes(storage, machine, id, options);
  if (now?.equals(before) !== true) {
    throw new FencedError(`Cannot change point ${id} of machine "${machine}": it was changed meanwhile`);
  }
  await storage.put(manifestKey(machine, id), bytes, { signal: options.signal });
  await options.fence();
  return changed;
}

/**
 * Completes what runs that died while they wrote images anew have left: each manifest says of its images what is
 * true, and hashes that belong to none are gone.
 */
export async function finishRewrites(
  storage: Storage,
  machine: string,
  options: ChangeOptions,
): Promise<void> {
  const { points } = await surveyMachine(storage, machine, options);
  for (const point of points) {
    if (point.pending === undefined) continue;
    const settled = await settle(storage, point, options);
    await changePoint(storage, machine, point.id, () => settled, options);
    await removeStrayHashes(storage, settled, options);
  }
}

/** Removes the hashes in a point's folder that its manifest does not name: those of images that were written anew. */
export async function removeStrayHashes(
  storage: Storage,
  { id, machine, disks, pending = {} }: PointManifest,
  options: ChangeOptions,
): Promise<void> {
  const named = new Set(
    [...disks, ...Object.values(pending)].flatMap(({ hashes }) =>
      hashes == null ? [] : [hashesKey(machine.name, id, hashes.file)],
    ),
  );
  const stray: string[] = [];
  for await (const { key } of storage.list(pointPrefix(machine.name, id), options)) {
    if (isHashesKey(key) && !named.has(key)) stray.push(key);
  }
  if (stray.length > 0) await options.fence();
  for (const key of stray) await storage.delete(key, options);
}

/**
 * Removes a committed point: its manifest, then its files.
 *
 * @throws {PointNeededError} when an image of another point is, or may be, an increment of one of its; nothing is removed
 */
export async function removePoint(
  storage: Storage,
  machine: string,
  id: string,
  options: ChangeOptions,
): Promise<void> {
  const { points, unreadable } = await surveyMachine(storage, machine, options);
  const needing = points.filter(({ disks, pending = {} }) =>
    [...disks, ...Object.values(pending)].some(({ parent }) => parent === id),
  );
  const unknown = unreadable.filter((other) => other.id > id);
  if (needing.length + unknown.length > 0) {
    throw new PointNeededError(machine, id, [...needing, ...unknown].map((point) => point.id).sort());
  }
  await options.fence();
  await storage.delete(manifestKey(machine, id), options);
  await discardPoint(storage, machine, id, options);
}
