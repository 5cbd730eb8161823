import { createHash } from "node:crypto";
import type { HeadLastSink } from "../bytes/index.js";
import { BlockBuilder } from "./block.js";
import {
  CLUSTERS_PER_BLOCK,
  encodeHashesHeader,
  encodeIndexEntry,
  HASH_BYTES,
  HASHES_HEADER_BYTES,
} from "./layout.js";

/** What a finished file of hashes is. */
export interface HashesSummary {
  readonly bytes: number;
  /** SHA-256 of its header, in hex: the header vouches for the index, and that for the blocks. */
  readonly sha256: string;
}

/** Geometry of the image, and the key of its chain. */
export interface HashWriterOptions {
  readonly virtualSize: number;
  readonly clusterSize: number;
  readonly key: Buffer;
}

/**
 * Writes the hashes of one image, front to back: blocks as their clusters are complete, the index, and the header
 * last. Memory holds the blocks that are not sealed, and the index: 40 bytes for each block of 8192 clusters.
 *
 * @example
 * const writer = HashWriter.create(sink, { virtualSize, clusterSize, key });
 * writer.add([7], hasher.hash(cluster));
 * writer.zero(8, 100);
 * await writer.seal(8192);
 * const { bytes, sha256 } = await writer.finish();
 */
export class HashWriter {
  readonly #sink: HeadLastSink;
  readonly #options: HashWriterOptions;
  readonly #clusters: number;
  /** By number. */
  readonly #open = new Map<number, BlockBuilder>();
  readonly #index: Buffer[] = [];
  #position = HASHES_HEADER_BYTES;
  /** Blocks below are written. */
  #written = 0;
  #dataClusters = 0;
  #zeroClusters = 0;
  #tail: Promise<unknown> = Promise.resolve();

  private constructor(sink: HeadLastSink, options: HashWriterOptions) {
    this.#sink = sink;
    this.#options = options;
    this.#clusters = Math.ceil(options.virtualSize / options.clusterSize);
  }

  /** @param sink made with a head of `HASHES_HEADER_BYTES` */
  static create(sink: HeadLastSink, options: HashWriterOptions): HashWriter {
    return new HashWriter(sink, options);
  }

  /**
   * Takes the hashes of clusters that the image holds as data.
   *
   * @param hashes one after another, in the order of `clusters`
   * @throws {RangeError} for a cluster beyond the disk, below the seal, or given before
   */
  add(clusters: readonly number[], hashes: Uint8Array): void {
    if (hashes.length !== clusters.length * HASH_BYTES)
      throw new RangeError(`${hashes.length} bytes are not the hashes of ${clusters.length} clusters`);
    for (const [position, cluster] of clusters.entries()) {
      const hash = hashes.subarray(position * HASH_BYTES, (position + 1) * HASH_BYTES);
      this.#blockOf(cluster).setData(cluster % CLUSTERS_PER_BLOCK, hash);
    }
  }

  /** Takes clusters that the image holds as explicitly zero. @throws {RangeError} as `add` does */
  zero(cluster: number, count: number): void {
    for (let next = cluster; next < cluster + count; next += 1) {
      this.#blockOf(next).setZero(next % CLUSTERS_PER_BLOCK);
    }
  }

  /** Promises that no cluster below `cluster` will come any more; resolves when the blocks below are written. */
  async seal(cluster: number): Promise<void> {
    const isWhole = cluster >= this.#clusters;
    const until = isWhole ? Infinity : Math.floor(cluster / CLUSTERS_PER_BLOCK);
    await this.#enqueue(() => this.#writeBelow(until));
  }

  /** Writes the rest and commits the sink. */
  async finish(): Promise<HashesSummary> {
    return await this.#enqueue(async () => {
      await this.#writeBelow(Infinity);
      const index = Buffer.concat(this.#index);
      const header = encodeHashesHeader({
        ...this.#options,
        dataClusters: this.#dataClusters,
        zeroClusters: this.#zeroClusters,
        indexOffset: this.#position,
        blocks: this.#index.length,
        indexDigest: createHash("sha256").update(index).digest(),
      });
      if (index.length > 0) await this.#sink.append(index);
      await this.#sink.commit(header);
      return {
        bytes: this.#position + index.length,
        sha256: createHash("sha256").update(header).digest("hex"),
      };
    });
  }

  /** Drops everything, once what is under way has settled. Never throws; harmless after `finish`. */
  async abort(): Promise<void> {
    await this.#tail.catch(() => undefined); // whoever called what failed has been told
    await this.#sink.abort();
  }

  #blockOf(cluster: number): BlockBuilder {
    const number = Math.floor(cluster / CLUSTERS_PER_BLOCK);
    if (!(cluster >= 0 && cluster < this.#clusters) || number < this.#written)
      throw new RangeError(`cluster ${cluster} is beyond the disk, or its block of hashes is written`);
    const block = this.#open.get(number) ?? new BlockBuilder();
    this.#open.set(number, block);
    return block;
  }

  async #writeBelow(until: number): Promise<void> {
    const due = [...this.#open].filter(([number]) => number < until).sort(([a], [b]) => a - b);
    if (until !== Infinity) this.#written = Math.max(this.#written, until);
    for (const [block, builder] of due) {
      this.#open.delete(block);
      const bytes = builder.encode();
      const digest = createHash("sha256").update(bytes).digest();
      this.#index.push(encodeIndexEntry({ block, length: bytes.length, digest }));
      this.#position += bytes.length;
      this.#dataClusters += builder.dataClusters;
      this.#zeroClusters += builder.zeroClusters;
      await this.#sink.append(bytes);
    }
  }

  /** Runs `step` after all steps before it; after a failure every later step fails the same way. */
  #enqueue<T>(step: () => Promise<T>): Promise<T> {
    const run = this.#tail.then(step);
    run.catch(() => undefined); // the caller awaits `run`; the queue itself is awaited by nobody
    this.#tail = run;
    return run;
  }
}
