import type { IoOptions } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
import type { Storage } from "../storage/index.js";
import { openChain, type DiskPlace } from "./open-chain.js";
import type { PointChain } from "./point-chain.js";
import { PointHashes } from "./point-hashes.js";

/** A disk at a point, opened to be compared with. */
export interface Comparison {
  readonly chain: PointChain;
  readonly hashes: PointHashes;
}

/**
 * Opens a disk at a point to compare another content with it: its chain, and the hashes of all of its images.
 *
 * @returns both, or why they cannot be had, for people: "point X has no hashes"
 * @throws {NotFoundError} when there is no such point, or it has no such disk
 */
export async function openComparison(
  storage: Storage,
  place: DiskPlace,
  options: IoOptions = {},
): Promise<Comparison | string> {
  let chain: PointChain;
  try {
    chain = await openChain(storage, place, options);
  } catch (error) {
    if (error instanceof DamageError) return `parent damaged: ${error.message}`;
    throw error;
  }
  let hashes: PointHashes | string | undefined;
  try {
    hashes = await PointHashes.open(storage, chain, options);
    return typeof hashes === "string" ? hashes : { chain, hashes };
  } finally {
    if (!(hashes instanceof PointHashes)) await chain.close();
  }
}
