import {
  CLUSTER_DATA,
  ClusterHasher,
  HASH_BYTES,
  type HashesSummary,
  type HashWriter,
} from "../hashes/index.js";
import type { MergeObserver } from "../qcow2/index.js";
import type { PointHashes } from "../repository/index.js";

/** A file of hashes that is damaged, or lacks some: the merged image has none then. */
class Incomplete extends Error {}

/** The hashes of a merged image: those of the images that it was merged of, and new ones of clusters that were made anew. */
export class MergedHashes implements MergeObserver {
  readonly #writer: HashWriter;
  readonly #source: PointHashes;
  readonly #hasher: ClusterHasher;
  /** Clusters since the last seal, by the image that has them. */
  #waiting = new Map<number, number[]>();
  #first = 0;
  #isIncomplete = false;

  constructor(writer: HashWriter, source: PointHashes) {
    this.#writer = writer;
    this.#source = source;
    this.#hasher = new ClusterHasher(source.key);
  }

  frame(cluster: number, image: number): void {
    const clusters = this.#waiting.get(image) ?? [];
    clusters.push(cluster);
    this.#waiting.set(image, clusters);
  }

  zero(cluster: number, count: number): void {
    if (!this.#isIncomplete) this.#writer.zero(cluster, count);
  }

  made(cluster: number, content: Buffer): void {
    if (!this.#isIncomplete) this.#writer.add([cluster], this.#hasher.hash(content));
  }

  async sealed(cluster: number): Promise<void> {
    const waiting = this.#waiting;
    const first = this.#first;
    this.#waiting = new Map();
    this.#first = cluster;
    if (this.#isIncomplete) return;
    try {
      for (const [image, clusters] of waiting) await this.#take(image, clusters, first, cluster);
      await this.#writer.seal(cluster);
    } catch (error) {
      if (!(error instanceof Incomplete)) throw error;
      this.#isIncomplete = true;
    }
  }

  /** Finishes the file. @returns null when hashes were missing: there is no file then */
  async finish(): Promise<HashesSummary | null> {
    if (!this.#isIncomplete) return await this.#writer.finish();
    await this.#writer.abort();
    return null;
  }

  /** Drops everything. Never throws. */
  async abort(): Promise<void> {
    await this.#writer.abort();
  }

  async #take(image: number, clusters: readonly number[], first: number, end: number): Promise<void> {
    const { states, hashes } = await this.#source.imageWindow(image, first, end - first);
    const found = Buffer.alloc(clusters.length * HASH_BYTES);
    for (const [position, cluster] of clusters.entries()) {
      const index = cluster - first;
      if (states[index] !== CLUSTER_DATA) throw new Incomplete();
      found.set(hashes.subarray(index * HASH_BYTES, (index + 1) * HASH_BYTES), position * HASH_BYTES);
    }
    this.#writer.add(clusters, found);
  }
}
