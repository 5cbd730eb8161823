import type { IoOptions } from "../bytes/index.js";
import { DamageError, NotFoundError } from "../errors/index.js";
import { ObjectReplacedError, type Storage } from "../storage/index.js";
import { surveyMachine } from "./catalogue.js";
import { findOnce } from "./commit.js";
import type { DiskManifest, PointManifest } from "./manifest.js";
import { PointChain, resolveChain, resolveTop, type ChainOptions, type FindPoint } from "./point-chain.js";
import { PointImage, type ImageFacts } from "./point-image.js";
import { dependentsOf } from "./tree.js";

/** Which disk at which point. */
export interface DiskPlace {
  readonly machine: string;
  /** Id. */
  readonly point: string;
  /** Name of the disk. */
  readonly disk: string;
}

export interface OpenChainOptions extends ChainOptions {
  /** How many images to open at most, from the top: who merges some must not pay for all that are below. Default all. */
  readonly depth?: number | undefined;
}

/** How often a chain is looked up anew that was changed while it was opened. */
const ATTEMPTS = 8;

/**
 * Opens a disk at a point: every image of its chain, checked against the manifests. What does not fit together
 * because the chain was rewritten meanwhile is looked up anew.
 *
 * @throws {NotFoundError} when there is no such point, or it has no such disk
 * @throws {DamageError} when a manifest or an image is missing or is not what it must be; names the
 *   object and the points that need it
 */
export async function openChain(
  storage: Storage,
  place: DiskPlace,
  options: OpenChainOptions = {},
): Promise<PointChain> {
  let failed: { readonly state: string; readonly error: DamageError } | undefined;
  for (let attempt = 1; ; attempt += 1) {
    let state = "";
    try {
      const facts = await lookUp(storage, place, options);
      state = stateOf(facts);
      // Damage is what is wrong twice, with nothing changed in between.
      if (failed?.state === state) throw failed.error;
      const known = facts.map(({ point }) => point.id).reverse();
      const affected = (id: string, token: string): Promise<readonly string[]> =>
        affectedBy(storage, place.machine, id, token, known);
      return await PointChain.open(storage, facts, affected, options);
    } catch (error) {
      if (error instanceof ObjectReplacedError && attempt < ATTEMPTS) continue;
      if (!(error instanceof DamageError) || error === failed?.error || attempt === ATTEMPTS) throw error;
      if (failed !== undefined && state === "" && failed.state === "") throw error;
      failed = { state, error };
    }
  }
}

/**
 * Opens one image of a point alone, checked against its manifest and its parent's.
 *
 * @throws {DamageError} when it is missing or is not what it must be, or its parent's manifest is missing
 */
export async function openImage(
  storage: Storage,
  { machine, point, disk }: DiskPlace,
  options: IoOptions = {},
): Promise<PointImage> {
  const find = findOnce(storage, machine, options);
  const { top, found } = await findDisk(find, { machine, point, disk });
  const facts = await resolveTop(top, found, find);
  const affected = (): Promise<readonly string[]> =>
    affectedBy(storage, machine, point, found.token, [point]);
  return await PointImage.open(storage, facts, { ...options, affected });
}

async function lookUp(
  storage: Storage,
  { machine, point, disk }: DiskPlace,
  { depth, ...options }: OpenChainOptions,
): Promise<ImageFacts[]> {
  const find = findOnce(storage, machine, options);
  const { top, found } = await findDisk(find, { machine, point, disk });
  return await resolveChain(top, found, find, depth);
}

/** @throws {NotFoundError} when there is no such point, or it has no such disk */
async function findDisk(
  find: FindPoint,
  { machine, point, disk }: DiskPlace,
): Promise<{ readonly top: PointManifest; readonly found: DiskManifest }> {
  const top = await find(point);
  if (top === undefined)
    throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find point ${point} of machine "${machine}"`);
  const found = top.disks.find((candidate) => candidate.name === disk);
  if (found !== undefined) return { top, found };
  const names = top.disks.map((candidate) => `"${candidate.name}"`).join(", ");
  throw new NotFoundError(
    "TM_DISK_NOT_FOUND",
    `Cannot find disk "${disk}" in point ${point} of machine "${machine}"`,
    { hint: `It holds ${names}` },
  );
}

/** What a chain consists of, as text: equal texts, equal chains. */
function stateOf(facts: readonly ImageFacts[]): string {
  return JSON.stringify(facts.map(({ point, disk }) => [point.id, disk.bytes, disk.sha256]));
}

/** The points that need an image; at least those `known` to, where manifests cannot be read. */
async function affectedBy(
  storage: Storage,
  machine: string,
  id: string,
  token: string,
  known: readonly string[],
): Promise<readonly string[]> {
  const above = known.slice(Math.max(known.indexOf(id), 0));
  try {
    const { points } = await surveyMachine(storage, machine);
    const ids = dependentsOf(points, id, token).map((point) => point.id);
    return [...new Set([...above, ...ids])].sort();
  } catch {
    // The damage is the news: that the list of its victims cannot be completed must not hide it.
    return above;
  }
}
