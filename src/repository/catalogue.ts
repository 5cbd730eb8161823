import PQueue from "p-queue";
import type { IoOptions } from "../bytes/index.js";
import type { TidemarkError } from "../errors/index.js";
import { isPointId } from "../point/index.js";
import { ObjectNotFoundError, ObjectTooLargeError, type Storage } from "../storage/index.js";
import { ManifestDamageError, NewerFormatError } from "./errors.js";
import { isMachineName, machinePrefix, manifestKey } from "./layout.js";
import { MAX_MANIFEST_BYTES, type PointManifest } from "./manifest.js";
import { decodeManifest } from "./manifest-codec.js";
import { sortPoints } from "./tree.js";

/** Manifests that are read at a time. */
const READING = 8;

/** A point whose manifest is there, but cannot be read. */
export interface UnreadablePoint {
  readonly id: string;
  readonly error: ManifestDamageError | NewerFormatError;
}

/** All that is in a machine's folder. */
export interface Survey {
  /** Oldest first. */
  readonly points: readonly PointManifest[];
  readonly unreadable: readonly UnreadablePoint[];
  /** Ids of folders without a manifest: points that were not committed, or not yet. */
  readonly uncommitted: readonly string[];
}

/** Names of the machines, sorted. */
export async function listMachines(storage: Storage, options: IoOptions = {}): Promise<string[]> {
  const names: string[] = [];
  for await (const name of storage.listFolders("", options)) if (isMachineName(name)) names.push(name);
  return names.sort();
}

/**
 * Reads the manifest of a point; undefined when it is definitely not there.
 *
 * @throws {ManifestDamageError | NewerFormatError} when it is there but cannot be read
 */
export async function readManifest(
  storage: Storage,
  machine: string,
  id: string,
  options: IoOptions = {},
): Promise<PointManifest | undefined> {
  const bytes = await readManifestBytes(storage, machine, id, options);
  return bytes === undefined ? undefined : decodeManifest(bytes, { machine, point: id });
}

/** As `readManifest`, without looking into it. */
export async function readManifestBytes(
  storage: Storage,
  machine: string,
  id: string,
  options: IoOptions = {},
): Promise<Buffer | undefined> {
  const key = manifestKey(machine, id);
  try {
    return await storage.get(key, { maxLength: MAX_MANIFEST_BYTES, ...options });
  } catch (error) {
    if (error instanceof ObjectNotFoundError) return undefined;
    if (error instanceof ObjectTooLargeError)
      throw new ManifestDamageError(key, [id], `it is longer than ${MAX_MANIFEST_BYTES} bytes`, {
        cause: error,
      });
    throw error;
  }
}

/** Reads all manifests of a machine. What cannot be read is in the result, by id; what fails is thrown. */
export async function surveyMachine(
  storage: Storage,
  machine: string,
  options: IoOptions = {},
): Promise<Survey> {
  const points: PointManifest[] = [];
  const unreadable: UnreadablePoint[] = [];
  const uncommitted: string[] = [];
  const read = async (id: string): Promise<void> => {
    try {
      const manifest = await readManifest(storage, machine, id, options);
      if (manifest === undefined) uncommitted.push(id);
      else points.push(manifest);
    } catch (error) {
      if (!isUnreadable(error)) throw error;
      unreadable.push({ id, error });
    }
  };
  const ids: string[] = [];
  for await (const name of storage.listFolders(machinePrefix(machine), options))
    if (isPointId(name)) ids.push(name);
  const queue = new PQueue({ concurrency: READING });
  await queue.addAll(ids.map((id) => () => read(id)));
  return {
    points: sortPoints(points),
    unreadable: unreadable.sort((a, b) => (a.id < b.id ? -1 : 1)),
    uncommitted: uncommitted.sort(),
  };
}

function isUnreadable(error: unknown): error is TidemarkError & UnreadablePoint["error"] {
  return error instanceof ManifestDamageError || error instanceof NewerFormatError;
}
