import { roundDown, roundUp, type IoOptions } from "../bytes/index.js";
import type { ImageReader } from "./reader.js";

/** What a merged image says about a run of whole clusters; `cluster` and `count` are counted in clusters. */
export type MergedRun =
  /** Nothing: what lies below the merged images decides, or zero where nothing does. */
  | { readonly kind: "unallocated"; readonly cluster: number; readonly count: number }
  | { readonly kind: "zero"; readonly cluster: number; readonly count: number }
  /** One cluster, as one of the images has it: `image` is its index, `at` and `storedLength` as in a CompressedMapping. */
  | {
      readonly kind: "frame";
      readonly cluster: number;
      readonly count: 1;
      readonly image: number;
      readonly at: number;
      readonly storedLength: number;
    }
  /**
   * One cluster whose content no image has as it must be, since an image ends inside it: what the whole chain has up to
   * `length` bytes into the cluster, then zeroes.
   */
  | { readonly kind: "cut"; readonly cluster: number; readonly count: 1; readonly length: number };

/**
 * Merges some images of a chain, neighbours of each other, into one that reads like the topmost of them: decides for
 * each cluster what that one must say, given what stays below it.
 *
 * The images may have different sizes. What lies beyond the end of an image reads as zero for those above it, whatever
 * is below: so a run that an upper image leaves to a shorter one becomes explicit zeroes as far as what stays below
 * reaches, and the cluster in which an image ends may have to be written anew. A frame's padding beyond its image's end is
 * zero and stays so: that is what later merges rely on.
 */
export class MergeWalk {
  readonly #images: readonly ImageReader[];
  readonly #clusterSize: number;
  /** Bytes of the disk as the topmost image has it. */
  readonly #size: number;
  /** Bytes of the image right below those that are merged; undefined: the merged image is full. */
  readonly #below: number | undefined;
  readonly #options: IoOptions;

  /**
   * @param images top first, all of one cluster size, each one's backing image next
   * @param below bytes of the disk as the image below the last one has it; undefined when that is a full image
   */
  constructor(images: readonly ImageReader[], below: number | undefined, options: IoOptions = {}) {
    const [top] = images;
    if (top === undefined) throw new RangeError("no images to merge");
    this.#images = images;
    this.#clusterSize = top.clusterSize;
    this.#size = top.virtualSize;
    this.#below = below;
    this.#options = options;
  }

  /** Runs in order that cover clusters `first` to `end`; no run is longer than what one L2 table maps. */
  async *runs(first: number, end: number): AsyncGenerator<MergedRun, void, void> {
    for (let cluster = first; cluster < end;) {
      this.#options.signal?.throwIfAborted();
      const run = await this.#runAt(cluster, end);
      cluster += run.count;
      yield run;
    }
  }

  async #runAt(cluster: number, end: number): Promise<MergedRun> {
    const size = this.#clusterSize;
    const offset = cluster * size;
    /** How far the images asked so far say the same, a multiple of the cluster. */
    let reach = end * size;
    /** Where the shortest of them ends; what lies beyond is zero. */
    let limit = Infinity;
    for (const [image, reader] of this.#images.entries()) {
      if (offset >= reader.virtualSize) return this.#zeroes(cluster, reach);
      const within = roundUp(Math.min(reach, reader.virtualSize), size);
      const run = await reader.runAt(offset, Math.min(within, reader.virtualSize), this.#options);
      if (run.kind === "plain")
        throw new RangeError(`image "${reader.name}" has clusters that are no frames`);
      if (run.kind === "compressed") {
        const used = Math.min(offset + size, reader.virtualSize);
        if (limit < used) return { kind: "cut", cluster, count: 1, length: limit - offset };
        return { kind: "frame", cluster, count: 1, image, at: run.at, storedLength: run.storedLength };
      }
      const stop = Math.min(within, roundUp(offset + run.length, size));
      if (run.kind === "zero") return this.#zeroes(cluster, stop);
      // The cluster that an image ends in is looked at alone.
      const isCut = reader.virtualSize < stop;
      const whole = isCut ? roundDown(reader.virtualSize, size) : stop;
      reach = Math.min(reach, whole > offset ? whole : offset + size);
      if (isCut && whole === offset) limit = Math.min(limit, reader.virtualSize);
    }
    return this.#nothing(cluster, reach, limit);
  }

  /** Zeroes, said aloud only where something below would show. */
  #zeroes(cluster: number, reach: number): MergedRun {
    const size = this.#clusterSize;
    const offset = cluster * size;
    const shown = roundUp(Math.min(this.#below ?? 0, this.#size), size);
    if (offset >= shown) return { kind: "unallocated", cluster, count: (reach - offset) / size };
    return { kind: "zero", cluster, count: (Math.min(reach, shown) - offset) / size };
  }

  /** No image says anything. @param limit where the shortest of them ends, if that is within the cluster */
  #nothing(cluster: number, reach: number, limit: number): MergedRun {
    const size = this.#clusterSize;
    const offset = cluster * size;
    const shown = Math.min(offset + size, this.#below ?? 0);
    // Where the topmost image itself ends first, its end hides the rest.
    if (limit < shown && limit < this.#size) {
      return { kind: "cut", cluster, count: 1, length: limit - offset };
    }
    return { kind: "unallocated", cluster, count: (reach - offset) / size };
  }
}
