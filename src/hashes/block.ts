import { CLUSTERS_PER_BLOCK, HASH_BYTES } from "./layout.js";

const MAP_BYTES = CLUSTERS_PER_BLOCK / 8;

/** Fewest and most bytes of a block. */
export const LEAST_BLOCK_BYTES = 2 * MAP_BYTES;
export const MOST_BLOCK_BYTES = LEAST_BLOCK_BYTES + CLUSTERS_PER_BLOCK * HASH_BYTES;

/**
 * A block that is being filled. Stored: a bit a cluster for those that hold data, a bit a cluster for those that
 * are explicitly zero (cluster n of the block is bit n % 8 of byte n / 8), then the hashes of the former in order.
 */
export class BlockBuilder {
  readonly #data = Buffer.alloc(MAP_BYTES);
  readonly #zero = Buffer.alloc(MAP_BYTES);
  #hashes: Buffer | undefined;
  #dataClusters = 0;
  #zeroClusters = 0;

  get dataClusters(): number {
    return this.#dataClusters;
  }

  get zeroClusters(): number {
    return this.#zeroClusters;
  }

  /** @throws {RangeError} when the cluster is there already */
  setData(slot: number, hash: Uint8Array): void {
    this.#take(this.#data, slot);
    this.#hashes ??= Buffer.alloc(CLUSTERS_PER_BLOCK * HASH_BYTES);
    this.#hashes.set(hash, slot * HASH_BYTES);
    this.#dataClusters += 1;
  }

  /** @throws {RangeError} when the cluster is there already */
  setZero(slot: number): void {
    this.#take(this.#zero, slot);
    this.#zeroClusters += 1;
  }

  /** The block as it is stored. */
  encode(): Buffer {
    const bytes = Buffer.alloc(LEAST_BLOCK_BYTES + this.#dataClusters * HASH_BYTES);
    this.#data.copy(bytes, 0);
    this.#zero.copy(bytes, MAP_BYTES);
    let at = LEAST_BLOCK_BYTES;
    for (let slot = 0; slot < CLUSTERS_PER_BLOCK && this.#hashes !== undefined; slot += 1) {
      if (!hasBit(this.#data, slot)) continue;
      at += this.#hashes.copy(bytes, at, slot * HASH_BYTES, (slot + 1) * HASH_BYTES);
    }
    return bytes;
  }

  #take(map: Buffer, slot: number): void {
    if (hasBit(this.#data, slot) || hasBit(this.#zero, slot)) {
      throw new RangeError(`cluster ${slot} of a block of hashes is given twice`);
    }
    map[slot >> 3] = (map[slot >> 3] ?? 0) | (1 << (slot & 7));
  }
}

/** A cluster that an image holds; `hashAt`: where its hash begins in the block, undefined for an explicit zero. */
export interface BlockCluster {
  readonly slot: number;
  readonly hashAt: number | undefined;
}

/** What is wrong with the bytes of a block; undefined when nothing is. */
export function blockProblem(bytes: Buffer): string | undefined {
  if (bytes.length < LEAST_BLOCK_BYTES) return `it has ${bytes.length} bytes`;
  let hashes = 0;
  for (let at = 0; at < MAP_BYTES; at += 1) {
    const data = bytes[at] ?? 0;
    if ((data & (bytes[MAP_BYTES + at] ?? 0)) !== 0) return "a cluster is both data and zero";
    for (let rest = data; rest !== 0; rest &= rest - 1) hashes += 1;
  }
  const expected = LEAST_BLOCK_BYTES + hashes * HASH_BYTES;
  return bytes.length === expected ? undefined : `it has ${bytes.length} bytes instead of ${expected}`;
}

/** The clusters of a block without a problem that the image holds, in order. */
export function* blockClusters(bytes: Buffer): Generator<BlockCluster> {
  let hashAt = LEAST_BLOCK_BYTES;
  for (let at = 0; at < MAP_BYTES; at += 1) {
    const data = bytes[at] ?? 0;
    const held = data | (bytes[MAP_BYTES + at] ?? 0);
    for (let bit = 0; held >> bit !== 0; bit += 1) {
      if (((held >> bit) & 1) === 0) continue;
      const slot = at * 8 + bit;
      if (((data >> bit) & 1) === 0) yield { slot, hashAt: undefined };
      else {
        yield { slot, hashAt };
        hashAt += HASH_BYTES;
      }
    }
  }
}

function hasBit(map: Buffer, slot: number): boolean {
  return (((map[slot >> 3] ?? 0) >> (slot & 7)) & 1) === 1;
}
