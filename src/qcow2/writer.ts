import { MiB, type HeadLastSink } from "../bytes/index.js";
import { ImageBody, type FrameBatch } from "./body.js";
import { frameBound, isChecksummedFrame, MIN_FRAME_BYTES } from "./cluster.js";
import { ImageWriteError } from "./errors.js";
import { encodeHead } from "./image-head.js";
import { clusterBitsOf, l2EntriesOf } from "./layout.js";
import { REFCOUNT_ORDER } from "./refcounts.js";
import { digestOfSegments, type Segment, type WrittenBase } from "./segments.js";
import { requireWritable, type ImageWriterOptions } from "./writer-options.js";

/** What a finished image is. */
export interface ImageSummary {
  /** Bytes of the file. */
  readonly length: number;
  readonly segments: readonly Segment[];
  /** SHA-256, in hex, of the concatenated binary segment digests. */
  readonly sha256: string;
  readonly dataClusters: number;
  readonly zeroClusters: number;
}

/**
 * Writes one qcow2 version 3 image front to back (docs/interop/qcow2.txt of QEMU): frames in the order in which they
 * come, byte-tight; L2 tables and refcount blocks in segments of their own once they are complete; what is left of
 * them at the end, then the header cluster at offset 0.
 *
 * Every data cluster is one zstd frame with a content checksum. Memory holds the tables of the range that is not
 * sealed yet, a few segments of finished ones, and the L1 table.
 *
 * After an error the image can only be aborted; what is tried nevertheless fails with the same error.
 *
 * @example
 * const writer = ImageWriter.create(sink, { virtualSize, clusterSize: 64 * KiB, identity });
 * await writer.append({ payload, frames: [{ cluster: 0, length: payload.length }] });
 * writer.zero(1, 15);
 * await writer.seal(16);
 * const summary = await writer.finish();
 */
export class ImageWriter {
  readonly #options: ImageWriterOptions;
  readonly #clusters: number;
  readonly #body: ImageBody;
  #sealed = 0;
  #dataClusters = 0;
  #zeroClusters = 0;
  #isOpen = true;
  #tail: Promise<unknown> = Promise.resolve();

  private constructor(sink: HeadLastSink, options: ImageWriterOptions, base?: WrittenBase) {
    const { virtualSize, clusterSize, segmentBytes = 8 * MiB } = options;
    this.#options = options;
    this.#clusters = Math.ceil(virtualSize / clusterSize);
    this.#body = new ImageBody(sink, { virtualSize, clusterSize, segmentBytes, base });
  }

  /**
   * Begins an image.
   *
   * @param sink made with a head of exactly one cluster
   * @throws {UsageError} for sizes or names that qcow2 or QEMU cannot have
   */
  static create(sink: HeadLastSink, options: ImageWriterOptions): ImageWriter {
    return new ImageWriter(sink, requireWritable(options));
  }

  /**
   * Begins an image in a sink that holds a copy of another image's bytes already, behind the header cluster. Of
   * its frames those live on that are referred to with `keep`; its tables are referred to by nothing. Memory holds
   * two bytes for each of its host clusters.
   *
   * @param sink the next byte that is appended lands at `base.length`
   * @throws {UsageError} for sizes or names that qcow2 or QEMU cannot have
   */
  static extend(sink: HeadLastSink, options: ImageWriterOptions, base: WrittenBase): ImageWriter {
    return new ImageWriter(sink, requireWritable(options), base);
  }

  /**
   * Appends frames, of clusters in any order. Calls are served one after the other, in the order of the calls; each
   * resolves when the sink has taken its payload, which must not change until then.
   *
   * @throws {ImageWriteError} for a cluster beyond the disk, below the seal or written before, and for what is no
   *   frame with a content checksum
   */
  async append(batch: FrameBatch): Promise<void> {
    this.#requireOpen();
    const sealed = this.#sealed;
    await this.#enqueue(async () => {
      this.#requireFrames(batch, sealed);
      await this.#body.append(batch);
      this.#dataClusters += batch.frames.length;
    });
  }

  /**
   * Makes a cluster one that the sink held at the beginning: see `extend`.
   *
   * @param at where its frame lies in the file
   * @param length bytes of it, or as many as its sectors have
   * @throws {ImageWriteError} for a cluster beyond the disk, below the seal or written before
   */
  keep(cluster: number, at: number, length: number): void {
    this.#enter(cluster, 1, () => this.#body.keep(cluster, at, length));
    this.#dataClusters += 1;
  }

  /**
   * Makes `count` clusters from `cluster` on explicit zero clusters: they read as zeroes whatever the parent holds.
   *
   * @throws {ImageWriteError} for clusters beyond the disk, below the seal or written before
   */
  zero(cluster: number, count: number): void {
    this.#enter(cluster, count, () => this.#body.zero(cluster, count));
    this.#zeroClusters += count;
  }

  /**
   * Promises that no cluster below `cluster` will be written any more, so that the tables of what lies below can
   * leave memory. Resolves when those that are due have been written.
   */
  async seal(cluster: number): Promise<void> {
    this.#requireOpen();
    this.#sealed = Math.max(this.#sealed, Math.min(cluster, this.#clusters));
    // A disk's last table is complete at the disk's end, which may come before the table's.
    const isWhole = this.#sealed === this.#clusters;
    const until = isWhole ? this.#clusters + l2EntriesOf(this.#options.clusterSize) : this.#sealed;
    await this.#enqueue(() => this.#body.release(until));
  }

  /**
   * Writes the rest of the tables, L1, refcounts and, last, the header cluster, and commits the sink.
   *
   * @param options.beforeCommit told what the image will be, when all but the header cluster is written; when it fails, so
   *   does this, and nothing is committed
   * @throws {ImageWriteError} when what is to be written does not decode to what was meant; nothing is committed then
   */
  async finish(
    options: { readonly beforeCommit?: (summary: ImageSummary) => Promise<void> } = {},
  ): Promise<ImageSummary> {
    this.#requireOpen();
    this.#isOpen = false;
    return await this.#enqueue(async () => {
      const head = await this.#finish();
      const segments = this.#body.segmentsWith(head);
      const summary = {
        length: this.#body.length,
        segments,
        sha256: digestOfSegments(segments),
        dataClusters: this.#dataClusters,
        zeroClusters: this.#zeroClusters,
      };
      await options.beforeCommit?.(summary);
      await this.#body.commit(head);
      return summary;
    });
  }

  /** Drops the image, once what is under way has settled. Never throws; harmless after `finish`. */
  async abort(): Promise<void> {
    this.#isOpen = false;
    await this.#tail.catch(() => undefined); // whoever called what failed has been told
    await this.#body.abort();
  }

  /** Makes table entries, at once; a failure fails every later step, too. */
  #enter(cluster: number, count: number, make: () => void): void {
    this.#requireOpen();
    try {
      this.#requireClusters(cluster, count, this.#sealed);
      make();
    } catch (error) {
      void this.#enqueue(() => Promise.reject(error as Error)).catch(() => undefined);
      throw error;
    }
  }

  /** Runs `step` after all steps before it; after a failure every later step fails the same way. */
  #enqueue<T>(step: () => Promise<T>): Promise<T> {
    const run = this.#tail.then(step);
    run.catch(() => undefined); // the caller awaits `run`; the queue itself is awaited by nobody
    this.#tail = run;
    return run;
  }

  /** Writes all that lies behind the header cluster. @returns that */
  async #finish(): Promise<Buffer> {
    const { virtualSize, clusterSize, backing, identity } = this.#options;
    const { point, parent, machine, disk, token } = identity;
    const places = await this.#body.finish();
    return encodeHead({
      header: {
        ...places,
        clusterBits: clusterBitsOf(clusterSize),
        size: virtualSize,
        refcountOrder: REFCOUNT_ORDER,
        compression: "zstd",
      },
      backingFile: backing?.file,
      backingFormat: backing?.format,
      identity: { point, parent, machine, disk, token },
    });
  }

  #requireFrames({ payload, frames }: FrameBatch, sealed: number): void {
    const most = frameBound(this.#options.clusterSize);
    let at = 0;
    for (const { cluster, length } of frames) {
      this.#requireClusters(cluster, 1, sealed);
      if (!(length >= MIN_FRAME_BYTES && length <= most) || !isChecksummedFrame(payload, at)) {
        throw new ImageWriteError(`cluster ${cluster} is no zstd frame with a content checksum`);
      }
      at += length;
    }
    if (at !== payload.length) {
      throw new ImageWriteError(`frames make up ${at} bytes, their payload has ${payload.length}`);
    }
  }

  #requireClusters(cluster: number, count: number, sealed: number): void {
    if (!(cluster >= sealed)) {
      throw new ImageWriteError(`cluster ${cluster} lies below the seal at ${sealed}`);
    }
    if (!(count >= 0 && cluster + count <= this.#clusters)) {
      throw new ImageWriteError(
        `clusters ${cluster} to ${cluster + count - 1} exceed the disk's ${this.#clusters} clusters`,
      );
    }
  }

  #requireOpen(): void {
    if (!this.#isOpen) throw new ImageWriteError("it is finished or aborted");
  }
}
