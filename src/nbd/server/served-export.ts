import { MiB, type IoOptions } from "../../bytes/index.js";
import type { BlockRun } from "../block-status.js";

/** Longest read that is answered, and longest payload that is taken off the wire: what every client keeps to. */
export const MAX_PAYLOAD = 32 * MiB;

/** A map that a server offers of an export. */
export interface ServedContext {
  /** "base:allocation", "qemu:dirty-bitmap:changed", … */
  readonly name: string;
  /**
   * Runs in order that cover [offset, offset + length); the last one may end later. They should begin at multiples of 512:
   * QEMU takes a whole sector for what its first byte is.
   */
  runs(offset: number, length: number, options: IoOptions): AsyncIterable<BlockRun>;
}

/** A part of a disk, as it is read. */
export interface ServedPiece {
  readonly offset: number;
  readonly length: number;
  /** The content; undefined where the disk reads as zero. */
  readonly bytes: Uint8Array | undefined;
}

/** A disk that a server offers, for reading. */
export interface ServedExport {
  readonly name: string;
  /** For people who list the exports; "" for none. */
  readonly description: string;
  /** Bytes. */
  readonly size: number;
  /** Bytes that reads should be aligned to, a power of two: what is stored as one. */
  readonly preferredBlock: number;
  readonly contexts: readonly ServedContext[];
  /**
   * Reads a range that lies within the export, in pieces that follow one another and cover it. Several are read at a time; one
   * that is not asked for its next piece should hold no more than some MiB. What it throws is EIO to the client.
   */
  read(offset: number, length: number, options: IoOptions): AsyncIterable<ServedPiece>;
}

/** What a client chose in its handshake. */
export interface Agreement {
  readonly export: ServedExport;
  /** Replies come in chunks. */
  readonly isStructured: boolean;
  /** Contexts by the ids that they were given. */
  readonly contexts: ReadonlyMap<number, ServedContext>;
}
