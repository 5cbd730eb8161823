import { createHash } from "node:crypto";
import { KiB, type ByteSource, type IoOptions } from "../bytes/index.js";
import { endOf } from "../extent/index.js";
import type { Segment } from "../qcow2/index.js";

/** Piece of a segment whose digest is remembered once the whole segment was verified. */
const PIECE = 64 * KiB;
const DIGEST_BYTES = 32;

/** Makes the error for bytes that are not what was stored: it knows the image and the points. */
export type DamageReport = (what: string) => Promise<Error>;

/**
 * An image's bytes, its header and tables checked against the manifest before any byte of them is handed out.
 *
 * qcow2 has no checksum over its tables, and one wrong byte in them silently shows an older version of a cluster. So
 * the first read of a header or table segment digests the whole segment, and keeps a digest of each
 * piece of it: from then on the pieces alone are read and checked. Nothing is kept in memory but digests, and bytes
 * that change between two reads are noticed. Frames pass: each carries a checksum of its own. So that nothing
 * passes for a table which was stored as a frame, tables are read through `tables`.
 */
export class VerifyingSource implements ByteSource {
  readonly length: number;
  /** The header and the tables alone: refuses to read frames. */
  readonly tables: ByteSource;
  readonly #source: ByteSource;
  /** By offset: consecutive, from 0 to the image's end. */
  readonly #segments: readonly Segment[];
  readonly #report: DamageReport;
  /** Digests of the pieces of verified segments, or of those being verified. */
  readonly #pieces = new Map<Segment, Promise<Buffer>>();

  /**
   * @param segments of the image, as a validated manifest has them
   * @param report makes the errors
   */
  constructor(source: ByteSource, segments: readonly Segment[], report: DamageReport) {
    this.length = source.length;
    this.#source = source;
    this.#segments = [...segments].sort((a, b) => a.offset - b.offset);
    this.#report = report;
    this.tables = {
      length: this.length,
      read: (offset, length, options = {}) => this.#read(offset, length, false, options),
    };
  }

  async read(offset: number, length: number, options: IoOptions = {}): Promise<Buffer> {
    return await this.#read(offset, length, true, options);
  }

  async #read(offset: number, length: number, admitsFrames: boolean, options: IoOptions): Promise<Buffer> {
    options.signal?.throwIfAborted();
    if (!(offset >= 0 && length >= 0 && offset + length <= this.length))
      throw await this.#report(`it has ${this.length} bytes, ${length} were wanted at ${offset}`);
    const parts: Buffer[] = [];
    let index = length === 0 ? this.#segments.length : this.#indexAt(offset);
    for (let at = offset; at < offset + length; index += 1) {
      const segment = this.#segments[index];
      if (segment === undefined) throw await this.#report(`byte ${at} belongs to no segment of its manifest`);
      const end = Math.min(offset + length, endOf(segment));
      if (segment.kind !== "data") parts.push(await this.#readVerified(segment, at, end - at, options));
      else if (admitsFrames) parts.push(await this.#source.read(at, end - at, options));
      else throw await this.#report(`a table is said to be at byte ${at}, where frames are stored`);
      at = end;
    }
    const [only] = parts;
    return only !== undefined && parts.length === 1 ? only : Buffer.concat(parts);
  }

  async #readVerified(segment: Segment, offset: number, length: number, options: IoOptions): Promise<Buffer> {
    const digests = await this.#piecesOf(segment);
    options.signal?.throwIfAborted();
    const first = Math.floor((offset - segment.offset) / PIECE);
    const start = segment.offset + first * PIECE;
    const last = Math.ceil((offset + length - segment.offset) / PIECE);
    const end = Math.min(segment.offset + last * PIECE, endOf(segment));
    const bytes = await this.#source.read(start, end - start, options);
    for (let piece = first; piece < last; piece += 1) {
      const at = (piece - first) * PIECE;
      const expected = digests.subarray(piece * DIGEST_BYTES, (piece + 1) * DIGEST_BYTES);
      if (!sha256(bytes.subarray(at, at + PIECE)).equals(expected))
        throw await this.#report(`its ${segment.kind} at byte ${start + at} changed while it was read`);
    }
    return Buffer.from(bytes.subarray(offset - start, offset - start + length));
  }

  async #piecesOf(segment: Segment): Promise<Buffer> {
    let pieces = this.#pieces.get(segment);
    if (pieces === undefined) {
      // Shared by all who wait for it, so no single reader's abort may end it.
      pieces = this.#verify(segment);
      this.#pieces.set(segment, pieces);
    }
    try {
      return await pieces;
    } catch (error) {
      // A failure may pass: who asks again, reads again.
      if (this.#pieces.get(segment) === pieces) this.#pieces.delete(segment);
      throw error;
    }
  }

  async #verify(segment: Segment): Promise<Buffer> {
    const whole = createHash("sha256");
    const pieces: Buffer[] = [];
    for (let at = segment.offset; at < endOf(segment); at += PIECE) {
      const bytes = await this.#source.read(at, Math.min(PIECE, endOf(segment) - at));
      whole.update(bytes);
      pieces.push(sha256(bytes));
    }
    if (whole.digest("hex") === segment.sha256) return Buffer.concat(pieces);
    const range = `${segment.offset} to ${endOf(segment) - 1}`;
    throw await this.#report(`its ${segment.kind} in bytes ${range} differs from what was stored`);
  }

  /** Index of the segment that holds a byte. */
  #indexAt(offset: number): number {
    let low = 0;
    for (let high = this.#segments.length; low + 1 < high;) {
      const middle = Math.floor((low + high) / 2);
      if ((this.#segments[middle]?.offset ?? Infinity) <= offset) low = middle;
      else high = middle;
    }
    return low;
  }
}

function sha256(bytes: Uint8Array): Buffer {
  return createHash("sha256").update(bytes).digest();
}
