import type { HashesSummary, HashWriter } from "../hashes/index.js";
import type { ImageSummary, ImageWriter } from "../qcow2/index.js";

/** Frames of whole clusters, consecutive in one buffer, and the hashes of those clusters in the same order. */
export interface HashedFrames {
  readonly payload: Uint8Array;
  readonly frames: readonly { readonly cluster: number; readonly length: number }[];
  /** Empty where none are kept. */
  readonly hashes: Uint8Array;
}

/** What a finished disk of a point is. */
export interface DiskSummary {
  readonly image: ImageSummary;
  /** Null when none are kept. */
  readonly hashes: HashesSummary | null;
}

/** Writes a disk of a point: its image and, beside it, the hashes of what the image holds. */
export class DiskWriter {
  readonly #image: ImageWriter;
  readonly #hashes: HashWriter | undefined;

  /** @param hashes undefined: none are kept, since those of the parent are not at hand */
  constructor(image: ImageWriter, hashes: HashWriter | undefined) {
    this.#image = image;
    this.#hashes = hashes;
  }

  /** Appends clusters, each given once. */
  async append({ payload, frames, hashes }: HashedFrames): Promise<void> {
    this.#hashes?.add(
      frames.map(({ cluster }) => cluster),
      hashes,
    );
    await this.#image.append({ payload, frames });
  }

  /** Makes clusters explicitly zero. */
  zero(cluster: number, count: number): void {
    this.#image.zero(cluster, count);
    this.#hashes?.zero(cluster, count);
  }

  /** Promises that no cluster below `cluster` will come any more. */
  async seal(cluster: number): Promise<void> {
    await this.#image.seal(cluster);
    await this.#hashes?.seal(cluster);
  }

  /** Finishes both files. */
  async finish(): Promise<DiskSummary> {
    const hashes = (await this.#hashes?.finish()) ?? null;
    return { image: await this.#image.finish(), hashes };
  }

  /** Drops both. Never throws. */
  async abort(): Promise<void> {
    await this.#image.abort();
    await this.#hashes?.abort();
  }
}
