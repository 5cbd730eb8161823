import { CLUSTER_DATA, CLUSTER_UNKNOWN, CLUSTER_ZERO, type HashWindow } from "./chain.js";
import { HASH_BYTES } from "./layout.js";

/** What a parent holds of a few clusters, packed into one buffer that can change hands: hashes, then a state each. */
export class ExpectedClusters {
  readonly #hashes: Uint8Array;
  readonly #states: Uint8Array;

  /** @param packed what `pack` made */
  constructor(packed: ArrayBuffer) {
    const count = packed.byteLength / (HASH_BYTES + 1);
    this.#hashes = new Uint8Array(packed, 0, count * HASH_BYTES);
    this.#states = new Uint8Array(packed, count * HASH_BYTES, count);
  }

  /** Packs what a window says of some clusters. What lies outside of it is unknown. */
  static pack(window: HashWindow, clusters: readonly number[]): ArrayBuffer {
    const packed = new ArrayBuffer(clusters.length * (HASH_BYTES + 1));
    const into = new Uint8Array(packed);
    for (const [position, cluster] of clusters.entries()) {
      const at = (cluster - window.first) * HASH_BYTES;
      const state = window.states[cluster - window.first] ?? CLUSTER_UNKNOWN;
      into[clusters.length * HASH_BYTES + position] = state;
      if (state === CLUSTER_DATA)
        into.set(window.hashes.subarray(at, at + HASH_BYTES), position * HASH_BYTES);
    }
    return packed;
  }

  /** Whether the parent's cluster reads as zero, as far as is known. */
  isZero(position: number): boolean {
    return this.#states[position] === CLUSTER_ZERO;
  }

  /** Whether the parent's cluster is known to have this hash. */
  equals(position: number, hash: Uint8Array): boolean {
    if (this.#states[position] !== CLUSTER_DATA) return false;
    const at = position * HASH_BYTES;
    return Buffer.compare(this.#hashes.subarray(at, at + HASH_BYTES), hash) === 0;
  }
}
