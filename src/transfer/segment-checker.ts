import type { ClusterFormat } from "../qcow2/index.js";
import { WorkerPool } from "./pool.js";

/** Bytes of a segment of an image, and what they must be. */
export interface SegmentCheck {
  readonly bytes: ArrayBuffer;
  /** Host offset of the segment in its image: for messages. */
  readonly at: number;
  /** SHA-256 in hex. */
  readonly sha256: string;
  /** How its frames decode; undefined when it holds none. */
  readonly frames: ClusterFormat | undefined;
}

/** Checks segments on worker threads: the digest of each, and that every frame in it decodes to a cluster. */
export class SegmentChecker {
  readonly #pool: WorkerPool;

  private constructor(pool: WorkerPool) {
    this.#pool = pool;
  }

  static start(workers: number): SegmentChecker {
    return new SegmentChecker(
      WorkerPool.start(new URL("./segment-checker.worker.js", import.meta.url), workers, undefined),
    );
  }

  /** The buffer changes hands. @returns what is wrong, for people; undefined when nothing is */
  async check(segment: SegmentCheck): Promise<string | undefined> {
    return (await this.#pool.run("check", segment, [segment.bytes])) as string | undefined;
  }

  async stop(): Promise<void> {
    await this.#pool.stop();
  }
}
