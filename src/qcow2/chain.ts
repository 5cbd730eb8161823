import type { IoOptions } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import { ClusterDecoder } from "./cluster.js";
import { clip, type ChainMapping, type Mapping } from "./mapping.js";
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
    // The current run of each image: no table is scanned twice, however the runs above interleave.
    const current: (Mapping | undefined)[] = [];
    let zero: ChainMapping | undefined;
    const end = offset + length;
    for (let next = offset; next < end;) {
      const run = await this.#runAt(next, end, current, options);
      next = run.offset + run.length;
      if (run.kind === "zero") {
        zero = zero === undefined ? run : { ...zero, length: zero.length + run.length };
        continue;
      }
      if (zero !== undefined) yield zero;
      zero = undefined;
      yield run;
    }
    if (zero !== undefined) yield zero;
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

  async #runAt(
    offset: number,
    end: number,
    current: (Mapping | undefined)[],
    options: IoOptions,
  ): Promise<ChainMapping> {
    let stop = end;
    for (const [image, reader] of this.images.entries()) {
      if (offset >= reader.virtualSize) break;
      let run = current[image];
      if (run === undefined || offset < run.offset || offset >= run.offset + run.length) {
        run = await reader.runAt(offset, Math.min(end, reader.virtualSize), options);
        current[image] = run;
      }
      if (run.kind === "unallocated") {
        stop = Math.min(stop, run.offset + run.length);
        continue;
      }
      const found = clip(run, offset, stop);
      return found.kind === "zero" ? found : { ...found, image };
    }
    return { offset, length: stop - offset, kind: "zero" };
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
