import type { IoOptions } from "../bytes/index.js";
import { clip, type ChainMapping, type Mapping } from "./mapping.js";
import type { ImageReader } from "./reader.js";

/**
 * A walk along a chain, from one offset to the next higher one. It remembers each image's current run, so that no
 * image is asked twice for one, and how far the images above have nothing to say, so that a step does not cost more
 * in a longer chain.
 */
export class ChainWalk {
  readonly #images: readonly ImageReader[];
  readonly #end: number;
  readonly #options: IoOptions;
  readonly #runs: (Mapping | undefined)[] = [];
  /** The image that is asked first: those above it are unallocated up to `#reach`. */
  #level = 0;
  #reach = 0;

  /** @param end no more than the top image's virtual size */
  constructor(images: readonly ImageReader[], end: number, options: IoOptions) {
    this.#images = images;
    this.#end = end;
    this.#options = options;
  }

  /**
   * The run at `offset`, which must not be lower than the last one asked for. There at once when the tables are in
   * memory, see ImageReader.runAt().
   */
  runAt(offset: number): ChainMapping | Promise<ChainMapping> {
    if (offset >= this.#reach) {
      this.#level = 0;
      this.#reach = this.#end;
    }
    for (; ; this.#level += 1) {
      const reader = this.#images[this.#level];
      // Beyond the end of an image nothing is read from those below it either.
      if (reader === undefined || offset >= reader.virtualSize) {
        return { offset, length: this.#reach - offset, kind: "zero" };
      }
      const run = this.#runOf(reader, offset);
      if (run instanceof Promise) {
        return run.then((loaded) => {
          this.#runs[this.#level] = loaded;
          return this.runAt(offset);
        });
      }
      if (run.kind !== "unallocated") {
        const found = clip(run, offset, this.#reach);
        return found.kind === "zero" ? found : { ...found, image: this.#level };
      }
      this.#reach = Math.min(this.#reach, run.offset + run.length);
    }
  }

  #runOf(reader: ImageReader, offset: number): Mapping | Promise<Mapping> {
    const known = this.#runs[this.#level];
    if (known !== undefined && offset >= known.offset && offset < known.offset + known.length) return known;
    const run = reader.runAt(offset, Math.min(this.#end, reader.virtualSize), this.#options);
    if (!(run instanceof Promise)) this.#runs[this.#level] = run;
    return run;
  }
}
