import type { IoOptions } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import { ClusterDecoder } from "./cluster.js";
import { ChainWalk } from "./chain-walk.js";
import { join, type ChainMapping } from "./mapping.js";
import { requireRange, type ImageReader } from "./reader.js";

/**
 * A backing chain read as one disk: where the top image leaves a run to its backing file, the next image below
 * answers. What no image holds is zero, and so is what lies beyond the end of a shorter image below: "they shall
 * read zeros for all parts that are not covered by the backing file".
 */
export class ImageChain {
  /** Top first. */
  readonly images: readonly ImageReader[];
  /** Bytes of the disk: those of the top image. */
  readonly virtualSize: number;
  readonly #decoders = new Map<number, ClusterDecoder>();

  private constructor(images: readonly ImageReader[], virtualSize: number) {
    this.images = images;
    this.virtualSize = virtualSize;
  }

  /**
   * @param images the top image first, each one's backing image next, down to the full image
   * @throws {UsageError} when there is none
   */
  static of(images: readonly ImageReader[]): ImageChain {
    const [top] = images;
    if (top === undefined) throw new UsageError("Cannot read chain: it has no image");
    return new ImageChain(images, top.virtualSize);
  }

  /**
   * Maps [offset, offset + length): runs in order that cover the whole range, each resolved down the chain.
   *
   * @throws {UsageError} when the range exceeds the disk
   * @throws {DamageError} when a table of an image contradicts the format or the file's length
   */
  async *map(
    offset: number,
    length: number,
    options: IoOptions = {},
  ): AsyncGenerator<ChainMapping, void, void> {
    requireRange(this.#name, this.virtualSize, offset, length);
    const walk = new ChainWalk(this.images, offset + length, options);
    let run: ChainMapping | undefined;
    for (let next = offset; next < offset + length;) {
      options.signal?.throwIfAborted();
      const found = walk.runAt(next);
      const piece = found instanceof Promise ? await found : found;
      next += piece.length;
      const longer = run === undefined ? piece : join(run, piece);
      if (longer === undefined && run !== undefined) yield run;
      run = longer ?? piece;
    }
    if (run !== undefined) yield run;
  }

  /**
   * Reads and decodes [offset, offset + length), on this thread: for small reads. The result is one buffer.
   *
   * @throws {UsageError} when the range exceeds the disk
   * @throws {DamageError} when a table or a cluster is damaged
   */
  async read(offset: number, length: number, options: IoOptions = {}): Promise<Buffer> {
    requireRange(this.#name, this.virtualSize, offset, length);
    const result = Buffer.alloc(length);
    for await (const run of this.map(offset, length, options)) {
      if (run.kind === "zero") continue;
      (await this.#readRun(run, options)).copy(result, run.offset - offset);
    }
    return result;
  }

  get #name(): string {
    return this.images[0]?.name ?? "chain";
  }

  async #readRun(run: Exclude<ChainMapping, { kind: "zero" }>, options: IoOptions): Promise<Buffer> {
    const reader = this.images[run.image];
    if (reader === undefined) throw new RangeError(`the chain has no image ${run.image}`);
    if (run.kind === "plain") return await reader.source.read(run.at, run.length, options);
    const stored = await reader.source.read(run.at, run.storedLength, options);
    const cluster = Buffer.allocUnsafe(reader.clusterSize);
    this.#decoderOf(run.image, reader).decode(stored, cluster, { object: reader.name, at: run.at });
    return cluster.subarray(run.skip, run.skip + run.length);
  }

  #decoderOf(image: number, reader: ImageReader): ClusterDecoder {
    let decoder = this.#decoders.get(image);
    if (decoder === undefined) {
      decoder = new ClusterDecoder(reader.format);
      this.#decoders.set(image, decoder);
    }
    return decoder;
  }
}
