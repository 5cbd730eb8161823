import { KiB, MiB, type IoOptions } from "../bytes/index.js";
import { endOf, type Extent } from "../extent/index.js";
import type { ChainMapping, ClusterFormat, CompressedMapping, ImageChain } from "../qcow2/index.js";
import type { DiskPiece } from "./chain-stream.js";
import { WorkerPool } from "./pool.js";

/** Stored bytes of an image, and the frames in them whose clusters follow one another on the disk. */
export interface FrameRun {
  readonly format: ClusterFormat;
  /** The image, as the operator knows it, and the host offset of `stored` in it: for messages. */
  readonly object: string;
  readonly at: number;
  readonly stored: ArrayBuffer;
  /** Where each frame begins in `stored`, and how long it is at most: the frame itself knows its end. */
  readonly frames: readonly { readonly at: number; readonly length: number }[];
}

/** Clusters that follow one another on the disk and lie close together in one image: one read, one decoding. */
type Run = [CompressedInChain, ...CompressedInChain[]];
type CompressedInChain = CompressedMapping & { readonly image: number };
type Step = Exclude<ChainMapping, CompressedInChain> | { readonly kind: "run"; readonly clusters: Run };

/** Bytes of a piece that holds data, at most. */
const PIECE = MiB;
/** Pieces that are loaded ahead of the one being handed out. */
const AHEAD = 2;
/** Stored bytes that are read and thrown away rather than paying for another read. */
const GAP = 64 * KiB;

/** Reads ranges of chains, many at a time, decoding on worker threads: whoever waits for one keeps no other from going on. */
export class RangeReader {
  readonly #pool: WorkerPool;

  private constructor(pool: WorkerPool) {
    this.#pool = pool;
  }

  static start(workers: number): RangeReader {
    const script = new URL("./range-reader.worker.js", import.meta.url);
    return new RangeReader(WorkerPool.start(script, workers, undefined));
  }

  /**
   * Reads a range, in pieces, in the order of the disk. A consumer that waits holds back the reads: AHEAD + 1 pieces are in memory
   * at most, however long the range is.
   *
   * @throws {UsageError} when the range exceeds the disk
   * @throws {DamageError} when an image's tables or frames are not what was stored
   */
  async *read(
    chain: ImageChain,
    { offset, length }: Extent,
    options: IoOptions = {},
  ): AsyncGenerator<DiskPiece> {
    const loading: Promise<DiskPiece>[] = [];
    try {
      for await (const step of stepsOf(chain.map(offset, length, options))) {
        const piece = this.#load(chain, step, options);
        // Its failure is thrown when its turn comes.
        piece.catch(() => undefined);
        loading.push(piece);
        if (loading.length > AHEAD) yield await (loading.shift() as Promise<DiskPiece>);
      }
      for (let next = loading.shift(); next !== undefined; next = loading.shift()) yield await next;
    } finally {
      await Promise.allSettled(loading);
    }
  }

  /** Ends the threads. What still waits for them fails. */
  async stop(): Promise<void> {
    await this.#pool.stop();
  }

  async #load(chain: ImageChain, step: Step, options: IoOptions): Promise<DiskPiece> {
    switch (step.kind) {
      case "zero":
        return { offset: step.offset, length: step.length, bytes: undefined };
      case "plain": {
        const { offset, length, at, image } = step;
        return { offset, length, bytes: await readerOf(chain, image).source.read(at, length, options) };
      }
      case "run":
        return await this.#loadRun(chain, step.clusters, options);
    }
  }

  async #loadRun(chain: ImageChain, clusters: Run, options: IoOptions): Promise<DiskPiece> {
    const [first] = clusters;
    const { source, format, name: object } = readerOf(chain, first.image);
    const start = Math.min(...clusters.map(({ at }) => at));
    const end = Math.max(...clusters.map(({ at, storedLength }) => at + storedLength));
    const stored = wholeMemory(await source.read(start, end - start, options));
    const frames = clusters.map(({ at, storedLength }) => ({ at: at - start, length: storedLength }));
    const run: FrameRun = { format, object, at: start, stored, frames };
    const decoded = Buffer.from((await this.#pool.run("decode", run, [stored])) as ArrayBuffer);
    // Only the first cluster can begin inside itself, and only the last one can end early.
    const length = endOf(clusters.at(-1) ?? first) - first.offset;
    return { offset: first.offset, length, bytes: decoded.subarray(first.skip, first.skip + length) };
  }
}

function readerOf(chain: ImageChain, image: number): ImageChain["images"][number] {
  const reader = chain.images[image];
  if (reader === undefined) throw new RangeError(`the chain has no image ${image}`);
  return reader;
}

/** Joins compressed clusters into runs, cuts plain ones to the size of a piece. */
async function* stepsOf(mappings: AsyncIterable<ChainMapping>): AsyncGenerator<Step> {
  let clusters: Run | undefined;
  for await (const mapping of mappings) {
    if (mapping.kind === "compressed" && clusters !== undefined && continues(clusters, mapping)) {
      clusters.push(mapping);
      continue;
    }
    if (clusters !== undefined) yield { kind: "run", clusters };
    clusters = undefined;
    if (mapping.kind === "compressed") clusters = [mapping];
    else if (mapping.kind === "plain") {
      for (let done = 0; done < mapping.length; done += PIECE) {
        const length = Math.min(PIECE, mapping.length - done);
        yield { ...mapping, offset: mapping.offset + done, at: mapping.at + done, length };
      }
    } else yield mapping;
  }
  if (clusters !== undefined) yield { kind: "run", clusters };
}

function continues(clusters: Run, next: CompressedInChain): boolean {
  const [first] = clusters;
  const last = clusters.at(-1) ?? first;
  const gap = next.at - last.at;
  return (
    next.image === first.image &&
    next.offset === endOf(last) &&
    gap >= 0 &&
    gap <= last.storedLength + GAP &&
    endOf(next) - first.offset <= PIECE
  );
}

/** A buffer's memory, to change hands: copied if it is only a slice of a larger one. */
function wholeMemory(bytes: Buffer): ArrayBuffer {
  const { buffer, byteLength } = bytes;
  return buffer instanceof ArrayBuffer && buffer.byteLength === byteLength
    ? buffer
    : new Uint8Array(bytes).buffer;
}
