import type { IoOptions } from "../bytes/index.js";
import { blockClusters } from "./block.js";
import { HashDamageError } from "./errors.js";
import { CLUSTERS_PER_BLOCK, HASH_BYTES } from "./layout.js";
import type { HashReader } from "./reader.js";

/** What a chain holds of a cluster. `unknown`: something that no hash is at hand for. */
export const CLUSTER_ZERO = 0;
export const CLUSTER_DATA = 1;
export const CLUSTER_UNKNOWN = 2;
const UNDECIDED = 3;

/** What a chain holds of consecutive clusters. */
export interface HashWindow {
  /** Number of the first one. */
  readonly first: number;
  /** One of `CLUSTER_…` for each. */
  readonly states: Uint8Array;
  /** One for each; only those of clusters that hold data count. */
  readonly hashes: Uint8Array;
}

/** How a window is read. */
export interface WindowOptions extends IoOptions {
  /** Told of each block that is damaged. */
  readonly onDamage?: ((error: HashDamageError) => void) | undefined;
}

/**
 * The hashes of a chain of images, merged: of each cluster the topmost image's that holds it. What no image holds is
 * zero, and so is what lies beyond the end of an image, whatever those below hold there.
 */
export class HashChain {
  readonly key: Buffer;
  readonly #readers: readonly HashReader[];

  private constructor(key: Buffer, readers: readonly HashReader[]) {
    this.key = key;
    this.#readers = readers;
  }

  /**
   * @param readers top first, down to the full image; all of one cluster size
   * @returns undefined when they are not of one key, or none: they cannot be compared with the same hashes then
   */
  static of(readers: readonly HashReader[]): HashChain | undefined {
    const [top] = readers;
    if (top === undefined || readers.some(({ key }) => !key.equals(top.key))) return undefined;
    return new HashChain(top.key, readers);
  }

  /**
   * What the chain holds of `count` clusters from `first` on. Where a file of hashes is damaged, what it and those
   * below it would have said is unknown: whoever compares stores such clusters anew.
   */
  async window(first: number, count: number, options: WindowOptions = {}): Promise<HashWindow> {
    const states = new Uint8Array(count).fill(UNDECIDED);
    const window = { first, states, hashes: new Uint8Array(count * HASH_BYTES) };
    for (let next = first; next < first + count;) {
      options.signal?.throwIfAborted();
      const number = Math.floor(next / CLUSTERS_PER_BLOCK);
      const end = Math.min((number + 1) * CLUSTERS_PER_BLOCK, first + count);
      await this.#fill(window, number, states.subarray(next - first, end - first), options);
      next = end;
    }
    return window;
  }

  /** What one image of the chain holds, whatever those above and below it hold. @param image its index, 0 being the top */
  async imageWindow(
    image: number,
    first: number,
    count: number,
    options: WindowOptions = {},
  ): Promise<HashWindow> {
    const reader = this.#readers[image];
    if (reader === undefined) throw new RangeError(`the chain has no image ${image}`);
    return await new HashChain(this.key, [reader]).window(first, count, options);
  }

  /** Fills in what one block says; `part`: its states in the window. */
  async #fill(window: HashWindow, number: number, part: Uint8Array, options: WindowOptions): Promise<void> {
    /** Bytes of the disk that the images above let through. */
    let limit = Infinity;
    let undecided = part.length;
    for (const reader of this.#readers) {
      try {
        const block = await reader.block(number, options);
        if (block !== undefined) undecided -= merge(window, number, block, reader, limit);
      } catch (error) {
        if (!(error instanceof HashDamageError)) throw error;
        options.onDamage?.(error);
        replace(part, CLUSTER_UNKNOWN);
        return;
      }
      limit = Math.min(limit, reader.virtualSize);
      if (undecided === 0 || number * CLUSTERS_PER_BLOCK * reader.clusterSize >= limit) break;
    }
    replace(part, CLUSTER_ZERO);
  }
}

/** Enters what a block says of clusters that no image above holds. @returns how many that were */
function merge(
  { first, states, hashes }: HashWindow,
  number: number,
  block: Buffer,
  { clusterSize, virtualSize }: HashReader,
  limit: number,
): number {
  let decided = 0;
  for (const { slot, hashAt } of blockClusters(block)) {
    const cluster = number * CLUSTERS_PER_BLOCK + slot;
    const index = cluster - first;
    if (states[index] !== UNDECIDED || cluster * clusterSize >= limit) continue;
    decided += 1;
    // Of a cluster that an image above cuts off inside, only the beginning shows: its hash is not this one.
    const isCut = limit < Math.min((cluster + 1) * clusterSize, virtualSize);
    if (hashAt === undefined) states[index] = CLUSTER_ZERO;
    else if (isCut) states[index] = CLUSTER_UNKNOWN;
    else {
      states[index] = CLUSTER_DATA;
      hashes.set(block.subarray(hashAt, hashAt + HASH_BYTES), index * HASH_BYTES);
    }
  }
  return decided;
}

/** Decides all that is not. */
function replace(states: Uint8Array, state: number): void {
  for (let index = states.indexOf(UNDECIDED); index !== -1; index = states.indexOf(UNDECIDED, index + 1)) {
    states[index] = state;
  }
}
