import { MiB, type HeadLastSink } from "../bytes/index.js";
import { ImageBody } from "./body.js";
import { ImageWriteError } from "./errors.js";
import { encodeHead } from "./image-head.js";
import { clusterBitsOf, DEFAULT_CLUSTER_SIZE, l2EntriesOf } from "./layout.js";
import { REFCOUNT_ORDER } from "./refcounts.js";

/**
 * Writes a qcow2 image for a machine to run on: a whole disk, in order, its clusters neither compressed nor
 * checksummed, what was not written unallocated. No part of a repository: it has no backing file and no identity.
 *
 * @example
 * const writer = PlainImageWriter.create(sink, virtualSize);
 * await writer.write(0, firstBytes);
 * await writer.write(64 * MiB, moreBytes);
 * await writer.finish();
 */
export class PlainImageWriter {
  readonly #virtualSize: number;
  readonly #body: ImageBody;
  /** The cluster that is being filled. */
  readonly #cluster = Buffer.alloc(DEFAULT_CLUSTER_SIZE);
  #filling: number | undefined;
  #end = 0;

  private constructor(sink: HeadLastSink, virtualSize: number) {
    this.#virtualSize = virtualSize;
    this.#body = new ImageBody(sink, {
      virtualSize,
      clusterSize: DEFAULT_CLUSTER_SIZE,
      segmentBytes: 8 * MiB,
      isDigested: false,
    });
  }

  /**
   * Begins an image.
   *
   * @param sink made with a head of DEFAULT_CLUSTER_SIZE bytes
   * @param virtualSize bytes of the disk
   */
  static create(sink: HeadLastSink, virtualSize: number): PlainImageWriter {
    return new PlainImageWriter(sink, virtualSize);
  }

  /** Writes bytes of the disk; offsets only rise from call to call. What is left out reads as zeroes. */
  async write(offset: number, bytes: Buffer): Promise<void> {
    if (offset < this.#end || offset + bytes.length > this.#virtualSize) {
      throw new ImageWriteError(`${bytes.length} bytes at ${offset} are out of order, or beyond the disk`);
    }
    this.#end = offset + bytes.length;
    for (let at = 0; at < bytes.length;) {
      const index = Math.floor((offset + at) / DEFAULT_CLUSTER_SIZE);
      if (index !== this.#filling) await this.#begin(index);
      const within = (offset + at) % DEFAULT_CLUSTER_SIZE;
      at += bytes.copy(this.#cluster, within, at);
    }
  }

  /** Writes the rest and commits the sink. */
  async finish(): Promise<void> {
    await this.#begin(undefined);
    const places = await this.#body.finish();
    const head = encodeHead({
      header: {
        ...places,
        clusterBits: clusterBitsOf(DEFAULT_CLUSTER_SIZE),
        size: this.#virtualSize,
        refcountOrder: REFCOUNT_ORDER,
        compression: "zlib",
      },
      backingFile: undefined,
      backingFormat: undefined,
      identity: undefined,
    });
    await this.#body.commit(head);
  }

  /** Drops the image. Never throws; harmless after `finish`. */
  async abort(): Promise<void> {
    await this.#body.abort();
  }

  /** Appends the cluster that was being filled, and begins another one. */
  async #begin(next: number | undefined): Promise<void> {
    if (this.#filling !== undefined) {
      await this.#body.appendPlain(this.#filling, this.#cluster);
      const entries = l2EntriesOf(DEFAULT_CLUSTER_SIZE);
      if (next !== undefined && Math.floor(next / entries) > Math.floor(this.#filling / entries)) {
        await this.#body.release(next);
      }
    }
    this.#filling = next;
    this.#cluster.fill(0);
  }
}
