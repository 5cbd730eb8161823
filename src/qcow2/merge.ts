import { MiB, type IoOptions } from "../bytes/index.js";
import type { ImageChain } from "./chain.js";
import { ClusterDecoder, FrameEncoder, frameBound, frameLength } from "./cluster.js";
import { frameLengths } from "./frame-lengths.js";
import { l2EntriesOf } from "./layout.js";
import { MergeWalk, type MergedRun } from "./merge-walk.js";
import type { ImageReader } from "./reader.js";
import type { ImageWriter } from "./writer.js";

/** Told what becomes of each cluster, in no order within what one L2 table maps. */
export interface MergeObserver {
  /** A cluster as one of the images has it. @param image its index in the chain */
  frame(cluster: number, image: number): void;
  zero(cluster: number, count: number): void;
  /** A cluster that no image has as it is. */
  made(cluster: number, content: Buffer): void;
  /** Nothing below `cluster` will come any more. */
  sealed(cluster: number): Promise<void>;
}

/** Images to be merged, and where to. */
export interface Merge extends IoOptions {
  /** The images that are merged, and the one that stays below them, if any. */
  readonly chain: ImageChain;
  /** Reads the whole chain, whatever else is below; default `chain` is all of it. */
  readonly read?: ImageChain["read"] | undefined;
  /** How many of its images are merged, from the top. */
  readonly count: number;
  /** Index of the one whose bytes the writer began with, if it did with any: its frames stay where they are. */
  readonly base?: number | undefined;
  readonly writer: ImageWriter;
  /** zstd level for the few clusters that are written anew. */
  readonly level: number;
  readonly observer?: MergeObserver | undefined;
  /** Asked, and waited for, before bytes of frames are copied. */
  readonly pace?: ((bytes: number) => Promise<void>) | undefined;
}

/** What a merge moved. */
export interface MergeSummary {
  /** Bytes of frames that were read from one image and written to the other. */
  readonly copiedBytes: number;
  /** Bytes of the base's frames that are in use still: see `frameLengths`. */
  readonly keptBytes: number;
}

/** Frames that are read before any is written. */
const BATCH_BYTES = 8 * MiB;
/** Bytes between two frames that are rather read than left out. */
const GAP = 64 * 1024;

type Frame = Extract<MergedRun, { kind: "frame" }>;

/**
 * Writes what some images of a chain say together into one image: see MergeWalk. Frames are copied as they are stored,
 * by ranges of what an L2 table maps, each range in the order in which they lie in their file. Each is decoded on the way:
 * what is damaged must not go on under new digests. The base's frames are not looked at.
 *
 * The writer is not finished: the caller does that.
 *
 * @throws {DamageError} when a table or a frame is damaged
 */
export async function mergeImages(merge: Merge): Promise<MergeSummary> {
  return await new Merger(merge).run();
}

class Merger {
  readonly #merge: Merge;
  readonly #images: readonly ImageReader[];
  readonly #clusterSize: number;
  #encoder: FrameEncoder | undefined;
  readonly #decoders = new Map<ImageReader, ClusterDecoder>();
  /** What a frame that is copied holds. */
  readonly #content: Buffer;
  #waiting: Frame[] = [];
  #waitingBytes = 0;
  #copied = 0;
  #kept = 0;
  /** Of the base's frames, by where they lie, within what is merged just now. */
  #baseLengths: ReadonlyMap<number, number> = new Map();

  constructor(merge: Merge) {
    this.#merge = merge;
    this.#images = merge.chain.images.slice(0, merge.count);
    this.#clusterSize = this.#images[0]?.clusterSize ?? 0;
    this.#content = Buffer.alloc(this.#clusterSize);
  }

  async run(): Promise<MergeSummary> {
    const { chain, count, base, writer, signal } = this.#merge;
    const baseReader = base === undefined ? undefined : this.#images[base];
    const walk = new MergeWalk(this.#images, chain.images[count]?.virtualSize, { signal });
    const clusters = Math.ceil(chain.virtualSize / this.#clusterSize);
    const step = l2EntriesOf(this.#clusterSize);
    for (let first = 0; first < clusters; first += step) {
      const end = Math.min(first + step, clusters);
      if (baseReader !== undefined)
        this.#baseLengths = await frameLengths(baseReader, first, end, { signal });
      for await (const run of walk.runs(first, end)) await this.#take(run);
      await this.#flush();
      await writer.seal(end);
      await this.#merge.observer?.sealed(end);
    }
    return { copiedBytes: this.#copied, keptBytes: this.#kept };
  }

  async #take(run: MergedRun): Promise<void> {
    const { writer, base, observer } = this.#merge;
    switch (run.kind) {
      case "unallocated":
        return;
      case "zero":
        writer.zero(run.cluster, run.count);
        observer?.zero(run.cluster, run.count);
        return;
      case "cut":
        await this.#writeCut(run.cluster, run.length);
        return;
      case "frame":
        observer?.frame(run.cluster, run.image);
        if (run.image === base) {
          writer.keep(run.cluster, run.at, run.storedLength);
          this.#kept += this.#baseLengths.get(run.at) ?? run.storedLength;
          return;
        }
        this.#waiting.push(run);
        this.#waitingBytes += run.storedLength;
        if (this.#waitingBytes >= BATCH_BYTES) await this.#flush();
    }
  }

  async #writeCut(cluster: number, length: number): Promise<void> {
    const { chain, read, level, writer, signal } = this.#merge;
    const offset = cluster * this.#clusterSize;
    const content = Buffer.alloc(this.#clusterSize);
    const used = Math.min(length, chain.virtualSize - offset);
    (await (read?.(offset, used, { signal }) ?? chain.read(offset, used, { signal }))).copy(content);
    this.#merge.observer?.made(cluster, content);
    this.#encoder ??= new FrameEncoder(level);
    const payload = Buffer.alloc(frameBound(this.#clusterSize));
    const stored = this.#encoder.encode(content, payload, 0);
    await writer.append({ payload: payload.subarray(0, stored), frames: [{ cluster, length: stored }] });
  }

  async #flush(): Promise<void> {
    const frames = this.#waiting.sort((a, b) => a.image - b.image || a.at - b.at);
    this.#waiting = [];
    this.#waitingBytes = 0;
    for (const group of neighbours(frames)) await this.#copy(group);
  }

  /** Copies frames of one image that lie close together. */
  async #copy(group: readonly Frame[]): Promise<void> {
    const [first] = group;
    const reader = first === undefined ? undefined : this.#images[first.image];
    if (first === undefined || reader === undefined) return;
    const end = Math.max(...group.map(({ at, storedLength }) => at + storedLength));
    await this.#merge.pace?.(group.reduce((sum, { storedLength }) => sum + storedLength, 0));
    const bytes = await reader.source.read(first.at, end - first.at, { signal: this.#merge.signal });
    const parts: Buffer[] = [];
    const frames: { cluster: number; length: number }[] = [];
    for (const { cluster, at, storedLength } of group) {
      const stored = bytes.subarray(at - first.at, at - first.at + storedLength);
      const origin = { object: reader.name, at };
      this.#decoderOf(reader).decode(stored, this.#content, origin);
      const length = frameLength(stored, origin);
      parts.push(stored.subarray(0, length));
      frames.push({ cluster, length });
      this.#copied += length;
    }
    await this.#merge.writer.append({ payload: Buffer.concat(parts), frames });
  }

  #decoderOf(reader: ImageReader): ClusterDecoder {
    const found = this.#decoders.get(reader) ?? new ClusterDecoder(reader.format);
    this.#decoders.set(reader, found);
    return found;
  }
}

/** Frames, sorted by where they lie, in groups that are read at once. */
function* neighbours(frames: readonly Frame[]): Generator<Frame[]> {
  let group: Frame[] = [];
  let start = 0;
  let end = 0;
  for (const frame of frames) {
    const isClose = group[0]?.image === frame.image && frame.at <= end + GAP;
    if (group.length > 0 && (!isClose || frame.at + frame.storedLength - start > BATCH_BYTES)) {
      yield group;
      group = [];
    }
    if (group.length === 0) start = end = frame.at;
    group.push(frame);
    end = Math.max(end, frame.at + frame.storedLength);
  }
  if (group.length > 0) yield group;
}
