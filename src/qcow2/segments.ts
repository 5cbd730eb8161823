import { createHash, type Hash } from "node:crypto";
import type { HeadLastSink } from "../bytes/index.js";

/** What a segment holds: frames of data clusters, tables and refcounts, or the header cluster. */
export type SegmentKind = "data" | "table" | "header";

/**
 * A range of bytes of an image with its digest. Segments are listed in the order of writing: consecutive from the
 * end of the header cluster on, the header cluster last.
 */
export interface Segment {
  readonly offset: number;
  readonly length: number;
  /** SHA-256 in hex. */
  readonly sha256: string;
  readonly kind: SegmentKind;
}

/** What a sink holds already: a copy of another image's bytes, from the end of its header cluster on. */
export interface WrittenBase {
  /** That image's segments without its header cluster. */
  readonly segments: readonly Segment[];
  /** Bytes of that image, its header cluster included. */
  readonly length: number;
}

const ZEROES = Buffer.alloc(64 * 1024);

/**
 * The digest of an image: SHA-256 over the binary digests of its segments, in their order. In hex.
 */
export function digestOfSegments(segments: readonly Segment[]): string {
  const hash = createHash("sha256");
  for (const segment of segments) hash.update(segment.sha256, "hex");
  return hash.digest("hex");
}

/** Writes a sink front to back and cuts it into segments, digesting each in the same pass. */
export class SegmentWriter {
  readonly #sink: HeadLastSink;
  readonly #segments: Segment[];
  #hash: Hash | undefined;
  #start: number;
  #position: number;

  /**
   * @param headLength bytes that the sink keeps free for the head
   * @param base what the sink holds already behind them
   * @param isDigested whether segments have digests, or empty ones: nobody verifies a disk that a machine writes to
   */
  constructor(sink: HeadLastSink, headLength: number, base?: WrittenBase, isDigested = true) {
    this.#sink = sink;
    if (isDigested) this.#hash = createHash("sha256");
    this.#start = base?.length ?? headLength;
    this.#position = this.#start;
    this.#segments = [...(base?.segments ?? [])];
  }

  /** Offset of the next byte. */
  get position(): number {
    return this.#position;
  }

  /** Bytes in the open segment. */
  get openLength(): number {
    return this.#position - this.#start;
  }

  /** Appends to the open segment. */
  async write(bytes: Uint8Array): Promise<void> {
    if (bytes.length === 0) return;
    this.#hash?.update(bytes);
    this.#position += bytes.length;
    await this.#sink.append(bytes);
  }

  /** Appends `count` zero bytes to the open segment. */
  async pad(count: number): Promise<void> {
    for (let left = count; left > 0; left -= ZEROES.length) {
      await this.write(left >= ZEROES.length ? ZEROES : ZEROES.subarray(0, left));
    }
  }

  /** Ends the open segment, unless it is empty. */
  close(kind: Exclude<SegmentKind, "header">): void {
    if (this.openLength === 0) return;
    const sha256 = this.#hash?.digest("hex") ?? "";
    this.#segments.push({ offset: this.#start, length: this.openLength, sha256, kind });
    if (this.#hash !== undefined) this.#hash = createHash("sha256");
    this.#start = this.#position;
  }

  /** All segments, and last the one that the head will be. */
  with(head: Uint8Array): readonly Segment[] {
    const sha256 = createHash("sha256").update(head).digest("hex");
    return [...this.#segments, { offset: 0, length: head.length, sha256, kind: "header" }];
  }

  /** Writes the head and commits the sink. */
  async commit(head: Uint8Array): Promise<void> {
    await this.#sink.commit(head);
  }

  /** Drops everything. Never throws. */
  async abort(): Promise<void> {
    await this.#sink.abort();
  }
}
