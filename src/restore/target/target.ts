import type { IoOptions } from "../../bytes/index.js";
import type { DiskPiece } from "../../transfer/index.js";

/**
 * Where a disk is restored to. Pieces arrive in the order of the disk and cover all of it.
 * Nothing is there under the target's name before `commit`, except where the target is not a file.
 */
export interface RestoreTarget {
  /** What to call it in messages and results. */
  readonly name: string;
  write(piece: DiskPiece, options?: IoOptions): Promise<void>;
  /** Makes the restored disk durable and visible. */
  commit(): Promise<void>;
  /** Removes what was written. Never throws; harmless after `commit`. */
  abort(): Promise<void>;
}
