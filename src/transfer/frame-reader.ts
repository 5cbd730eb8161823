import type { Extent } from "../extent/index.js";
import type { NbdAddress } from "../nbd/index.js";
import { WorkerPool } from "./pool.js";

/** An export that the workers read. */
export interface FrameExport {
  readonly address: NbdAddress;
  readonly exportName: string;
}

/** A unit of work: extents of one export, cluster-aligned but for the end of the disk. */
export interface FrameRequest {
  /** Index of the export. */
  readonly export: number;
  readonly extents: readonly Extent[];
  readonly clusterSize: number;
  /** A buffer to be used again for the payload. */
  readonly spare: ArrayBuffer | undefined;
}

/** What became of a unit. */
export interface FrameReply {
  /** zstd frames, one after another; only the first `used` bytes count. */
  readonly payload: ArrayBuffer;
  readonly used: number;
  readonly frames: readonly { readonly cluster: number; readonly length: number }[];
  /** Clusters that turned out to be all zero. */
  readonly zeros: readonly number[];
}

/** Spare payload buffers kept for reuse, at most. */
const SPARES = 16;

/**
 * Reads exports and compresses them into zstd frames, on worker threads that each have a connection per export
 * and a zstd context of their own: raw data never crosses a thread boundary, finished frames do, by transfer.
 *
 * The connections are opened (`start`) and negotiated (`greet`) in two steps: in between, duplicates of their
 * file descriptors can be handed to another process.
 */
export class FrameReader {
  readonly fileDescriptors: readonly number[];
  readonly #pool: WorkerPool;
  readonly #exports: readonly FrameExport[];
  readonly #spares: ArrayBuffer[] = [];

  private constructor(pool: WorkerPool, exports: readonly FrameExport[], fileDescriptors: readonly number[]) {
    this.#pool = pool;
    this.#exports = exports;
    this.fileDescriptors = fileDescriptors;
  }

  /** Starts `workers` threads and connects each of them to every export; nothing is said on the connections yet. */
  static async start(exports: readonly FrameExport[], workers: number): Promise<FrameReader> {
    const pool = WorkerPool.start(new URL("./frame-reader.worker.js", import.meta.url), workers, undefined);
    try {
      const descriptors = (await pool.runOnAll("open", exports)) as (number | undefined)[][];
      return new FrameReader(
        pool,
        exports,
        descriptors.flat().filter((fd) => fd !== undefined),
      );
    } catch (error) {
      await pool.stop();
      throw error;
    }
  }

  get workers(): number {
    return this.#pool.size;
  }

  /** Negotiates every connection. @param level zstd level, 1 to 19 */
  async greet(level: number): Promise<void> {
    await this.#pool.runOnAll("greet", { exports: this.#exports, level });
  }

  /** Reads and compresses one unit. Give the reply's payload back with `recycle` once it is written. */
  async read(request: Omit<FrameRequest, "spare">): Promise<FrameReply> {
    const spare = this.#spares.pop();
    const transfer = spare === undefined ? [] : [spare];
    return (await this.#pool.run(
      "read",
      { ...request, spare } satisfies FrameRequest,
      transfer,
    )) as FrameReply;
  }

  /** Takes a payload buffer back for reuse. */
  recycle(payload: ArrayBuffer): void {
    if (this.#spares.length < SPARES) this.#spares.push(payload);
  }

  /** Closes every connection, saying nothing: to be called when the exports are gone. Threads end too. */
  async close(): Promise<void> {
    // A thread that died has no connections any more; what it died of was told to who read.
    await this.#pool.runOnAll("close", undefined).catch(() => undefined);
    await this.#pool.stop();
  }
}
