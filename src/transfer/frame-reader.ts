import type { Extent } from "../extent/index.js";
import type { NbdAddress } from "../nbd/index.js";
import { WorkerPool, type Thread } from "./pool.js";
import { Replacement, type ReplacementOptions } from "./replacement.js";

/** An export that the workers read. */
export interface FrameExport {
  /** Name of the disk, for messages. */
  readonly disk: string;
  readonly address: NbdAddress;
  readonly exportName: string;
}

/** A unit of work: extents of one export, cluster-aligned but for the end of the disk. */
export interface FrameRequest {
  /** Index of the export. */
  readonly export: number;
  readonly extents: readonly Extent[];
  readonly clusterSize: number;
  /** Key of the hashes that are made of the clusters; undefined: none are made. */
  readonly hashKey: Uint8Array | undefined;
  /** What the parent holds of the unit's clusters (ExpectedClusters); what equals it is left out. */
  readonly expected: ArrayBuffer | undefined;
  /** A buffer to be used again for the payload. */
  readonly spare: ArrayBuffer | undefined;
}

/** What became of a unit. */
export interface FrameReply {
  /** zstd frames, one after another; only the first `used` bytes count. */
  readonly payload: ArrayBuffer;
  readonly used: number;
  readonly frames: readonly { readonly cluster: number; readonly length: number }[];
  /** Hashes of the frames' clusters, one after another; empty where no key was given. */
  readonly hashes: Uint8Array<ArrayBuffer>;
  /** Clusters that turned out to be all zero, but for those that the parent is known to have as zero. */
  readonly zeros: readonly number[];
}

/** Spare payload buffers kept for reuse, at most. */
const SPARES = 16;

/**
 * Reads exports and compresses them into zstd frames, on worker threads that each have a connection per export
 * and a zstd context of their own: raw data never crosses a thread boundary, finished frames do, by transfer.
 *
 * The connections are opened (`start`) and negotiated (`greet`) in two steps: in between, duplicates of their
 * file descriptors can be handed to another process. One that drops is replaced in the same two steps, and what was
 * read over it is read again.
 */
export class FrameReader {
  readonly #pool: WorkerPool;
  readonly #spares: ArrayBuffer[] = [];
  /** By thread and export. */
  readonly #connections: ReadonlyMap<Thread, readonly Replacement[]>;
  #level = 0;

  private constructor(pool: WorkerPool, exports: readonly FrameExport[], options: ReplacementOptions) {
    this.#pool = pool;
    const connectionsOf = (thread: Thread): Replacement[] =>
      exports.map(({ disk }, index) => {
        const open = async (): Promise<void> => {
          await thread.call("reopen", index);
        };
        const greet = (): Promise<void> => this.#greet(thread, index);
        return new Replacement({ what: `disk "${disk}"`, open, greet }, options);
      });
    this.#connections = new Map(pool.threads.map((thread) => [thread, connectionsOf(thread)]));
  }

  /**
   * Starts `workers` threads and connects each of them to every export; nothing is said on the connections yet.
   *
   * @param options how connections are replaced that drop
   */
  static async start(
    exports: readonly FrameExport[],
    workers: number,
    options: ReplacementOptions,
  ): Promise<FrameReader> {
    const pool = WorkerPool.start(new URL("./frame-reader.worker.js", import.meta.url), workers, undefined);
    try {
      await pool.runOnAll("open", exports);
      return new FrameReader(pool, exports, options);
    } catch (error) {
      await pool.stop();
      throw error;
    }
  }

  get workers(): number {
    return this.#pool.size;
  }

  /** Descriptors of all connections that are open, lost ones included. */
  async fileDescriptors(): Promise<readonly number[]> {
    return ((await this.#pool.runOnAll("descriptors", undefined)) as number[][]).flat();
  }

  /** Negotiates every connection. @param level zstd level, 1 to 19 */
  async greet(level: number): Promise<void> {
    this.#level = level;
    const greetings = [...this.#connections].flatMap(([thread, connections]) =>
      connections.map((connection, index) => connection.run(() => this.#greet(thread, index))),
    );
    const failed = (await Promise.allSettled(greetings)).find(({ status }) => status === "rejected");
    if (failed?.status === "rejected") throw failed.reason;
  }

  /**
   * Reads and compresses one unit. Give the reply's payload back with `recycle` once it is written.
   *
   * @throws {ConnectionError} TM_NBD_LOST when a connection was lost too often
   */
  async read(request: Omit<FrameRequest, "spare">): Promise<FrameReply> {
    const thread = this.#pool.idlest;
    const connection = this.#connections.get(thread)?.[request.export];
    if (connection === undefined) throw new RangeError(`export ${request.export} was not opened`);
    return await connection.run(async () => {
      const spare = this.#spares.pop();
      const transfer = spare === undefined ? [] : [spare];
      return (await thread.call(
        "read",
        { ...request, spare } satisfies FrameRequest,
        transfer,
      )) as FrameReply;
    });
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

  async #greet(thread: Thread, index: number): Promise<void> {
    await thread.call("greet", { index, level: this.#level });
  }
}
