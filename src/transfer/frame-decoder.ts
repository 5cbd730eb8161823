import { WorkerPool } from "./pool.js";

/** Stored bytes of an image and the frames in them. */
export interface DecodeRequest {
  readonly stored: ArrayBuffer;
  /** Place of each frame in `stored`; `length` is an upper bound, the frame itself knows its end. */
  readonly frames: readonly { readonly at: number; readonly length: number }[];
  readonly clusterSize: number;
  readonly compression: "zlib" | "zstd";
}

/** Decompresses clusters on worker threads; buffers change hands, they are not copied. */
export class FrameDecoder {
  readonly #pool: WorkerPool;

  private constructor(pool: WorkerPool) {
    this.#pool = pool;
  }

  static start(workers: number): FrameDecoder {
    return new FrameDecoder(
      WorkerPool.start(new URL("./frame-decoder.worker.js", import.meta.url), workers, undefined),
    );
  }

  /**
   * @returns the clusters in the order of `request.frames`, each `clusterSize` bytes
   * @throws {DamageError} when a frame's checksum or structure is wrong
   */
  async decode(request: DecodeRequest): Promise<Buffer> {
    return Buffer.from((await this.#pool.run("decode", request, [request.stored])) as ArrayBuffer);
  }

  async stop(): Promise<void> {
    await this.#pool.stop();
  }
}
