import type { IoOptions } from "../bytes/index.js";
import { BusyError, messageOf, TidemarkError } from "../errors/index.js";
import { step } from "../flow/index.js";
import type { Storage } from "../storage/index.js";
import { readManifest, readManifestBytes, surveyMachine } from "./catalogue.js";
import { FencedError } from "./errors.js";
import { manifestKey } from "./layout.js";
import type { PointManifest } from "./manifest.js";
import { encodeManifest } from "./manifest-codec.js";
import { settle } from "./pending.js";
import { resolveChain, resolveTop } from "./point-chain.js";
import { openHashes } from "./point-hashes.js";
import { PointImage } from "./point-image.js";

export interface CommitOptions extends IoOptions {
  /**
   * Throws when this run must not commit any more, as `MachineLock.verify` does. Asked just before and just after
   * the manifest is written: a suspended process may have lost its lock, and not know it yet.
   */
  readonly fence: () => Promise<void>;
}

/**
 * Commits a point whose images are all finished: checks them against the manifest, then writes the manifest, in one
 * atomic step. Afterwards looks once more whether it was allowed to, and withdraws the point if not.
 *
 * @throws {FencedError} or what `fence` throws, when the lock or the chain was lost meanwhile; the point is not there
 * @throws {DamageError} when an image or a parent is not what the manifest says; the point is not there
 * @throws {TidemarkError} TM_MANIFEST_TORN when the storage did not keep what it said it had; the point is not there
 * @throws {BusyError} TM_POINT_EXISTS when another point of this id is there; it is not touched
 */
export async function commitPoint(
  storage: Storage,
  manifest: PointManifest,
  options: CommitOptions,
): Promise<void> {
  const bytes = encodeManifest(manifest);
  const { id, machine } = manifest;
  const key = manifestKey(machine.name, id);
  await checkImages(storage, manifest, options);
  await options.fence();
  const before = await chainState(storage, manifest, options);
  await step("before the manifest");
  try {
    if (!(await storage.put(key, bytes, { ifAbsent: true, signal: options.signal }))) {
      // Ours, if an answer was lost and the request repeated.
      const found = await readManifestBytes(storage, machine.name, id, options);
      if (found?.equals(bytes) !== true) throw alreadyThere(manifest);
    }
    await step("manifest written");
    // From here on the signal interrupts nothing: either the point stands, or it is withdrawn.
    await options.fence();
    const found = await readManifestBytes(storage, machine.name, id);
    if (found !== undefined && isTorn(found, bytes))
      throw torn(storage, manifest, found.length, bytes.length);
    if (found?.equals(bytes) !== true) throw changed(manifest, "another manifest took the place of its own");
    if ((await chainState(storage, manifest, {})) !== before)
      throw changed(manifest, "the chain that it continues was changed");
    await checkImages(storage, manifest, {});
  } catch (error) {
    // A write that failed may have happened all the same.
    await withdraw(storage, manifest, bytes, error);
    throw error;
  }
}

/** Opens every image of the point, and its hashes, which checks their lengths and their headers. */
async function checkImages(storage: Storage, manifest: PointManifest, { signal }: IoOptions): Promise<void> {
  const find = findOnce(storage, manifest.machine.name, { signal });
  for (const disk of manifest.disks) {
    const facts = await resolveTop(manifest, disk, find);
    const affected = (): Promise<readonly string[]> => Promise.resolve([manifest.id]);
    const image = await PointImage.open(storage, facts, { signal, affected });
    await image.close();
    const hashes = await openHashes(storage, manifest.machine.name, manifest.id, disk, { signal });
    await hashes?.object.close();
  }
}

/** What the point's images rest on, as text: equal texts, equal chains. */
async function chainState(storage: Storage, manifest: PointManifest, options: IoOptions): Promise<string> {
  const find = findOnce(storage, manifest.machine.name, options);
  const chains = [];
  for (const disk of manifest.disks) {
    const chain = await resolveChain(manifest, disk, find);
    chains.push(
      chain.map((facts) => [facts.point.id, facts.disk.image, facts.disk.bytes, facts.disk.sha256]),
    );
  }
  return JSON.stringify(chains);
}

/** Reads each manifest once, as it holds now: the disks of a machine mostly share their chain's points. */
export function findOnce(
  storage: Storage,
  machine: string,
  options: IoOptions,
): (id: string) => Promise<PointManifest | undefined> {
  const found = new Map<string, Promise<PointManifest | undefined>>();
  const readSettled = async (id: string): Promise<PointManifest | undefined> => {
    const manifest = await readManifest(storage, machine, id, options);
    return manifest === undefined ? undefined : await settle(storage, manifest, options);
  };
  return (id) => {
    const reading = found.get(id) ?? readSettled(id);
    found.set(id, reading);
    return reading;
  };
}

function alreadyThere(manifest: PointManifest): BusyError {
  const what = `point ${manifest.id} of machine "${manifest.machine.name}"`;
  return new BusyError("TM_POINT_EXISTS", `Cannot commit ${what}: it is there already`);
}

function changed(manifest: PointManifest, what: string): FencedError {
  return new FencedError(
    `Cannot commit point ${manifest.id} of machine "${manifest.machine.name}": ${what} meanwhile`,
  );
}

/** Whether the storage kept only the beginning of what it was given: nobody else would write that. */
function isTorn(found: Buffer, bytes: Buffer): boolean {
  return found.length < bytes.length && bytes.subarray(0, found.length).equals(found);
}

function torn(storage: Storage, { id, machine }: PointManifest, found: number, length: number): Error {
  const what = `point ${id} of machine "${machine.name}"`;
  return new TidemarkError(
    "TM_MANIFEST_TORN",
    `Cannot commit ${what}: ${storage.description} kept ${found} of the ${length} bytes of its manifest, and said that all was well`,
    { hint: "Check that storage's disk and file system: it cannot be trusted with backups" },
  );
}

/**
 * Removes the manifest again, if it is this run's. A run that took the lock over may have seen the point and have
 * committed an increment of it: then it stays, whole as it is. That other run asks after its own commit whether
 * its parent is still there, as this one asks after its deletion whether there is a child: one of them sees the other.
 */
async function withdraw(
  storage: Storage,
  { id, machine }: PointManifest,
  bytes: Buffer,
  reason: unknown,
): Promise<void> {
  try {
    const found = await readManifestBytes(storage, machine.name, id);
    if (found === undefined || !(found.equals(bytes) || isTorn(found, bytes))) return;
    if (await mayHaveChildren(storage, machine.name, id)) return;
    const key = manifestKey(machine.name, id);
    await storage.delete(key);
    if (await mayHaveChildren(storage, machine.name, id)) await storage.put(key, bytes, { ifAbsent: true });
  } catch (error) {
    throw new TidemarkError(
      "TM_WITHDRAW_FAILED",
      `Cannot withdraw point ${id} of machine "${machine.name}", which must not be there (${messageOf(reason)}): ${messageOf(error)}`,
      { cause: error, hint: `Remove "${manifestKey(machine.name, id)}" from ${storage.description}` },
    );
  }
}

async function mayHaveChildren(storage: Storage, machine: string, id: string): Promise<boolean> {
  const { points, unreadable } = await surveyMachine(storage, machine);
  return (
    points.some(({ disks }) => disks.some(({ parent }) => parent === id)) ||
    unreadable.some((other) => other.id > id)
  );
}
