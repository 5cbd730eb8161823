import type { ClusterFormat } from "../qcow2/index.js";
import type { WantedFrame } from "./chain-window.js";
import { WorkerPool } from "./pool.js";

/** Stored bytes of an image, and the frames in them. */
export interface DecodeRequest {
  readonly format: ClusterFormat;
  /** The image, as the operator knows it, for messages, and the host offset in it of the stored bytes. */
  readonly object: string;
  readonly at: number;
  /** Where in the memory they are. */
  readonly slot: number;
  readonly frames: readonly WantedFrame[];
  /** Where in the memory the places begin that the frames name. */
  readonly base: number;
}

/** Decompresses clusters on worker threads, from one place of a memory that all share to another: nothing is copied. */
export class FrameDecoder {
  readonly memory: SharedArrayBuffer;
  readonly #pool: WorkerPool;

  private constructor(pool: WorkerPool, memory: SharedArrayBuffer) {
    this.#pool = pool;
    this.memory = memory;
  }

  /** @param bytes of memory; what is not used costs nothing */
  static start(workers: number, bytes: number): FrameDecoder {
    const memory = new SharedArrayBuffer(bytes);
    return new FrameDecoder(
      WorkerPool.start(new URL("./frame-decoder.worker.js", import.meta.url), workers, memory),
      memory,
    );
  }

  /**
   * Resolves when all frames are decoded; when it rejects, the content of their places is undefined.
   *
   * @throws {DamageError} when a frame does not decode to exactly one cluster
   */
  async decode(request: DecodeRequest): Promise<void> {
    await this.#pool.run("decode", request);
  }

  async stop(): Promise<void> {
    await this.#pool.stop();
  }
}
