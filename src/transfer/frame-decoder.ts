import type { ClusterFormat } from "../qcow2/index.js";
import { WorkerPool } from "./pool.js";

/** Stored bytes of an image and the frames in them. */
export interface DecodeRequest {
  readonly format: ClusterFormat;
  /** The image, as the operator knows it, and the host offset of `stored` in it: for messages. */
  readonly object: string;
  readonly at: number;
  readonly stored: ArrayBuffer;
  /** Place of each frame in `stored`; `length` is an upper bound, the frame itself knows its end. */
  readonly frames: readonly { readonly at: number; readonly length: number }[];
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
   * @returns the clusters in the order of `request.frames`, one after another
   * @throws {DamageError} when a frame does not decode to exactly one cluster
   */
  async decode(request: DecodeRequest): Promise<Buffer> {
    return Buffer.from((await this.#pool.run("decode", request, [request.stored])) as ArrayBuffer);
  }

  async stop(): Promise<void> {
    await this.#pool.stop();
  }
}
