import { createHash } from "node:crypto";
import { KiB, readInto, type ByteSource, type IoOptions, type ReadOptions } from "../bytes/index.js";
import { endOf } from "../extent/index.js";
import type { Segment } from "../qcow2/index.js";

/** Piece of a segment whose digest is remembered once the whole segment was verified. */
const PIECE = 64 * KiB;
const DIGEST_BYTES = 32;
/** Memory for digesting, used again: a long chain has thousands of segments to verify. */
const spare: Buffer[] = [];
const MOST_SPARE = 8;

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

  async read(offset: number, length: number, options: ReadOptions = {}): Promise<Buffer> {
    return await this.#read(offset, length, true, options);
  }

  async #read(
    offset: number,
    length: number,
    admitsFrames: boolean,
    { signal, into }: ReadOptions,
  ): Promise<Buffer> {
    signal?.throwIfAborted();
    if (!(offset >= 0 && length >= 0 && offset + length <= this.length))
      throw await this.#report(`it has ${this.length} bytes, ${length} were wanted at ${offset}`);
    const end = offset + length;
    const whole = into?.length === length ? into : Buffer.allocUnsafeSlow(length);
    let index = length === 0 ? this.#segments.length : this.#indexAt(offset);
    for (let at = offset; at < end;) {
      const segment = this.#segments[index];
      if (segment === undefined) throw await this.#report(`byte ${at} belongs to no segment of its manifest`);
      const stop = this.#endOfAlike(index, end);
      const part = whole.subarray(at - offset, stop - offset);
      if (segment.kind !== "data") await this.#readVerified(segment, at, part, { signal });
      else if (admitsFrames) await readInto(this.#source, at, part, { signal });
      else throw await this.#report(`a table is said to be at byte ${at}, where frames are stored`);
      at = stop;
      while ((this.#segments[index]?.offset ?? Infinity) < stop) index += 1;
    }
    return whole;
  }

  /** Where what is read at once ends: frames together, whatever their segments; of tables one segment. */
  #endOfAlike(index: number, end: number): number {
    let last = this.#segments[index];
    for (let next = index + 1; last?.kind === "data" && endOf(last) < end; next += 1) {
      const following = this.#segments[next];
      if (following?.kind !== "data") break;
      last = following;
    }
    return last === undefined ? end : Math.min(endOf(last), end);
  }

  async #readVerified(segment: Segment, offset: number, into: Buffer, options: IoOptions): Promise<void> {
    const digests = await this.#piecesOf(segment);
    options.signal?.throwIfAborted();
    const first = Math.floor((offset - segment.offset) / PIECE);
    const start = segment.offset + first * PIECE;
    const last = Math.ceil((offset + into.length - segment.offset) / PIECE);
    const end = Math.min(segment.offset + last * PIECE, endOf(segment));
    const isWhole = start === offset && end === offset + into.length;
    const bytes = isWhole ? into : Buffer.allocUnsafeSlow(end - start);
    await readInto(this.#source, start, bytes, options);
    for (let piece = first; piece < last; piece += 1) {
      const at = (piece - first) * PIECE;
      const expected = digests.subarray(piece * DIGEST_BYTES, (piece + 1) * DIGEST_BYTES);
      if (!sha256(bytes.subarray(at, at + PIECE)).equals(expected))
        throw await this.#report(`its ${segment.kind} at byte ${start + at} changed while it was read`);
    }
    if (!isWhole) bytes.copy(into, 0, offset - start);
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
    const memory = spare.pop() ?? Buffer.allocUnsafeSlow(PIECE);
    for (let at = segment.offset; at < endOf(segment); at += PIECE) {
      const bytes = memory.subarray(0, endOf(segment) - at);
      await readInto(this.#source, at, bytes);
      whole.update(bytes);
      pieces.push(sha256(bytes));
    }
    // After a failure it may still be read into.
    if (spare.length < MOST_SPARE) spare.push(memory);
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
