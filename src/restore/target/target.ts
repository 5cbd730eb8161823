import type { IoOptions } from "../../bytes/index.js";
import type { DiskPiece } from "../../transfer/index.js";

/**
 * Where a disk is restored to. Pieces arrive in the order of the disk and cover all of it.
 */
export interface RestoreTarget {
  /** Bytes of the disk that were written, zeroes that took a write included. */
  readonly written: number;
  /** Takes a piece. It may be under way when this resolves: its bytes must not change until `settle` has resolved. */
  write(piece: DiskPiece, options?: IoOptions): Promise<void>;
  /** Resolves when nothing is under way. @throws what any write before met */
  settle(): Promise<void>;
  /** Makes the restored disk durable and, where it is a new file, visible. */
  commit(): Promise<void>;
  /** Removes what was written, where it can be removed. Never throws; harmless after `commit`. */
  abort(): Promise<void>;
}

/** A target that was checked and may be written; nothing of it is changed yet. */
export interface PreparedTarget {
  /** What to call it in messages and results. */
  readonly name: string;
  /** Bytes that fit; undefined when it takes whatever the disk has. */
  readonly capacity?: number | undefined;
  /** It is there already and is written in place: when the restore fails, it holds a mixture. */
  readonly isInPlace: boolean;
  /**
   * Begins.
   *
   * @param length bytes of the disk, or of the part of it that is restored
   * @param whole called when all is written and durable, before an image that was written in place is let go
   */
  begin(length: number, whole?: () => Promise<void>): Promise<RestoreTarget>;
  /** Lets go of it. Never throws; harmless after the target has ended. */
  dispose(): Promise<void>;
}
