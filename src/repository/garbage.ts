import type { IoOptions } from "../bytes/index.js";
import { messageOf, TidemarkError } from "../errors/index.js";
import { ImageReader } from "../qcow2/index.js";
import type { Storage } from "../storage/index.js";
import { readManifestBytes, surveyMachine, type Survey } from "./catalogue.js";
import { backingPoint, isHashesKey, lockKey, machinePrefix, manifestKey, pointPrefix } from "./layout.js";
import type { MachineLock } from "./lock.js";

/** Leftovers younger than this may be another run's attempt at the lock. */
const LEFTOVER_AGE = 3_600_000;

/** What a collection did. */
export interface Collection {
  /** Ids of uncommitted points that were removed. */
  readonly removed: readonly string[];
  /** Files of writers that never committed, removed besides. */
  readonly leftovers: number;
  /** Folders without a manifest that were left alone. */
  readonly kept: readonly { readonly id: string; readonly reason: string }[];
}

/**
 * Removes what dead runs left of points that they never committed. A folder without a manifest stays when a
 * manifest, or the backing name of an image that stays, refers to it; all stay when any manifest cannot be read.
 *
 * @param lock of this machine: nobody else is writing there
 */
export async function collectGarbage(
  storage: Storage,
  machine: string,
  lock: MachineLock,
  options: IoOptions = {},
): Promise<Collection> {
  if (lock.key !== lockKey(machine))
    throw new RangeError(`"${lock.key}" is not the lock of machine "${machine}"`);
  const survey = await surveyMachine(storage, machine, options);
  const reasons = await reasonsToKeep(storage, machine, survey, options);
  const removed: string[] = [];
  for (const id of survey.uncommitted.filter((candidate) => !reasons.has(candidate))) {
    await lock.verify(options);
    await discardPoint(storage, machine, id, options);
    removed.push(id);
  }
  await lock.verify(options);
  const before = new Date(Date.now() - LEFTOVER_AGE);
  const leftovers = await storage.discardLeftovers(machinePrefix(machine), { before, ...options });
  return { removed, leftovers, kept: [...reasons].map(([id, reason]) => ({ id, reason })) };
}

/**
 * Removes the files of a point that was not committed.
 *
 * @throws {TidemarkError} TM_POINT_COMMITTED when it has a manifest, whatever is in it
 */
export async function discardPoint(
  storage: Storage,
  machine: string,
  id: string,
  options: IoOptions = {},
): Promise<void> {
  const manifest = await readManifestBytes(storage, machine, id, options);
  const keys: string[] = [];
  for await (const { key } of storage.list(pointPrefix(machine, id), options)) keys.push(key);
  // Asked twice: network file systems remember for a while that a file was not there.
  if (manifest !== undefined || keys.includes(manifestKey(machine, id))) {
    throw new TidemarkError(
      "TM_POINT_COMMITTED",
      `Cannot discard point ${id} of machine "${machine}": it is committed`,
    );
  }
  for (const key of keys) await storage.delete(key, options);
  await storage.discardLeftovers(pointPrefix(machine, id), options);
}

/** Why folders without a manifest must stay, by id. */
async function reasonsToKeep(
  storage: Storage,
  machine: string,
  survey: Survey,
  options: IoOptions,
): Promise<Map<string, string>> {
  const reasons = new Map<string, string>();
  const uncommitted = new Set(survey.uncommitted);
  const [unreadable] = survey.unreadable;
  if (unreadable !== undefined) {
    const reason = `what point ${unreadable.id} needs is not known: ${unreadable.error.message}`;
    for (const id of uncommitted) reasons.set(id, reason);
    return reasons;
  }
  const kept: string[] = [];
  const keep = (id: string | null | undefined, reason: string): void => {
    if (id == null || !uncommitted.has(id) || reasons.has(id)) return;
    reasons.set(id, reason);
    kept.push(id);
  };
  for (const point of survey.points) {
    for (const disk of point.disks)
      keep(disk.parent, `point ${point.id} needs it, though its manifest is missing`);
  }
  for (let id = kept.pop(); id !== undefined; id = kept.pop()) {
    for await (const { key } of storage.list(pointPrefix(machine, id), options)) {
      if (isHashesKey(key)) continue;
      const backing = await backingOf(storage, key, options);
      if ("unknown" in backing) {
        for (const other of uncommitted) keep(other, `what "${key}" needs is not known: ${backing.unknown}`);
      } else keep(backing.point, `"${key}" needs it, though its manifest is missing`);
    }
  }
  return reasons;
}

/** The point that a stored image says it is an increment of. */
async function backingOf(
  storage: Storage,
  key: string,
  options: IoOptions,
): Promise<{ readonly point: string | undefined } | { readonly unknown: string }> {
  const object = await storage.open(key, options);
  try {
    const { backingFile } = await ImageReader.open(object, { name: key, ...options });
    const point = backingFile === undefined ? undefined : backingPoint(backingFile);
    if (backingFile !== undefined && point === undefined)
      return { unknown: `its backing file is "${backingFile}"` };
    return { point };
  } catch (error) {
    options.signal?.throwIfAborted();
    return { unknown: messageOf(error) };
  } finally {
    await object.close();
  }
}
