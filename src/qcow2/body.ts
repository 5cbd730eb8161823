import { roundUp, type HeadLastSink } from "../bytes/index.js";
import { decodeL1Entry, encodeL1Entry } from "./entry.js";
import { ImageWriteError } from "./errors.js";
import { ENTRY_BYTES, l1EntriesFor, l2EntriesOf } from "./layout.js";
import { RefcountBuilder } from "./refcounts.js";
import { SegmentWriter, type Segment, type WrittenBase } from "./segments.js";
import { TableBuilder } from "./tables.js";

/** zstd frames of whole clusters, consecutive in one buffer. */
export interface FrameBatch {
  readonly payload: Uint8Array;
  /** Guest cluster and stored length in bytes of each frame, in the payload's order. */
  readonly frames: readonly { readonly cluster: number; readonly length: number }[];
}

/** Where the tables that the header names are. */
export interface TablePlaces {
  readonly l1Size: number;
  readonly l1TableOffset: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
}

/** What may leave memory but is not written yet: L2 tables and refcount blocks, one cluster each. */
interface WaitingTable {
  readonly kind: "l2" | "refcounts";
  readonly index: number;
  readonly bytes: Buffer;
}

/** With a short data segment open, tables wait for it to grow until they make up this many segments. */
const PATIENCE = 4;

/** Least part of `segmentBytes` that a segment has, unless it is the last of its kind or the header. */
const LEAST_SEGMENT = 5 / 8;

/** Geometry of an image in writing, in bytes. */
export interface BodyOptions {
  readonly virtualSize: number;
  readonly clusterSize: number;
  readonly segmentBytes: number;
  /** What the sink holds already. Frames of it are referred to with `keep`. */
  readonly base?: WrittenBase | undefined;
  /** Whether segments are digested; default true. */
  readonly isDigested?: boolean | undefined;
}

/**
 * Everything of an image behind its header cluster, written front to back: frames byte-tight as they come, tables
 * in segments of their own. Calls must not overlap.
 */
export class ImageBody {
  readonly #clusterSize: number;
  readonly #segmentBytes: number;
  readonly #segments: SegmentWriter;
  readonly #tables: TableBuilder;
  readonly #refcounts: RefcountBuilder;
  readonly #l1: Buffer;
  readonly #waiting: WaitingTable[] = [];
  /** Frames are referred to that lie anywhere in the file: no refcount block is complete before all are known. */
  readonly #hasBase: boolean;
  #l2Tables = 0;

  constructor(sink: HeadLastSink, options: BodyOptions) {
    const { virtualSize, clusterSize, segmentBytes, base, isDigested } = options;
    this.#hasBase = base !== undefined;
    this.#clusterSize = clusterSize;
    this.#segmentBytes = segmentBytes;
    this.#segments = new SegmentWriter(sink, clusterSize, base, isDigested);
    this.#tables = new TableBuilder(clusterSize);
    this.#refcounts = new RefcountBuilder(clusterSize);
    this.#refcounts.count(0, clusterSize);
    this.#l1 = Buffer.alloc(l1EntriesFor(virtualSize, clusterSize) * ENTRY_BYTES);
  }

  /** Bytes of the file so far. */
  get length(): number {
    return this.#segments.position;
  }

  /** Appends frames, ending the data segment between two of them where it has its length. */
  async append({ payload, frames }: FrameBatch): Promise<void> {
    let written = 0;
    let end = 0;
    for (const { cluster, length } of frames) {
      if (this.#segments.openLength + (end - written) >= this.#segmentBytes) {
        await this.#segments.write(payload.subarray(written, end));
        written = end;
        await this.#writeTablesWhenDue();
        this.#segments.close("data");
      }
      const at = this.#segments.position + (end - written);
      this.#tables.setCompressed(cluster, at, length);
      this.#refcounts.count(at, length);
      end += length;
    }
    await this.#segments.write(payload.subarray(written, end));
    await this.#writeTablesWhenDue();
  }

  /** Appends one cluster as it is: in images that hold nothing else every cluster lies where a cluster begins. */
  async appendPlain(cluster: number, bytes: Buffer): Promise<void> {
    if (this.#segments.openLength >= this.#segmentBytes) {
      await this.#writeTablesWhenDue();
      this.#segments.close("data");
    }
    const at = this.length;
    this.#tables.setPlain(cluster, at);
    this.#refcounts.count(at, this.#clusterSize);
    await this.#segments.write(bytes);
    await this.#writeTablesWhenDue();
  }

  /** Maps a cluster to a frame that the base holds. */
  keep(cluster: number, at: number, length: number): void {
    this.#tables.setCompressed(cluster, at, length);
    this.#refcounts.count(at, length);
  }

  /** Makes explicit zero clusters. */
  zero(cluster: number, count: number): void {
    this.#tables.setZero(cluster, count);
  }

  /** Lets the L2 tables that end at or below `cluster` leave memory. */
  async release(cluster: number): Promise<void> {
    this.#takeL2(Math.floor(cluster / l2EntriesOf(this.#clusterSize)));
    await this.#writeTablesWhenDue();
  }

  /** Writes all tables that are left: L2, L1, refcount blocks, refcount table. */
  async finish(): Promise<TablePlaces> {
    const l1Size = this.#l1.length / ENTRY_BYTES;
    this.#takeL2(l1Size);
    await this.#endData();
    this.#takeRefcounts(true);
    while (this.#waiting.length > 0) {
      await this.#writeWaiting(this.#waiting.length);
      this.#takeRefcounts(true);
    }
    const l1TableOffset = l1Size === 0 ? 0 : this.length;
    if (l1Size > 0) await this.#writeL1();

    const end = this.#refcounts.finish(this.length);
    for (const { bytes } of end.blocks) await this.#writeTable(bytes);
    if (this.length !== end.tableOffset) throw new ImageWriteError("its refcount table is misplaced");
    await this.#writeTable(end.table);
    this.#segments.close("table");
    return {
      l1Size,
      l1TableOffset,
      refcountTableOffset: end.tableOffset,
      refcountTableClusters: end.tableClusters,
    };
  }

  /** All segments, with the one that the header cluster will be. */
  segmentsWith(head: Buffer): readonly Segment[] {
    return this.#segments.with(head);
  }

  /** Writes the header cluster and commits. */
  async commit(head: Buffer): Promise<void> {
    await this.#segments.commit(head);
  }

  /** Drops everything. Never throws. */
  async abort(): Promise<void> {
    await this.#segments.abort();
  }

  #takeL2(until: number): void {
    for (const table of this.#tables.takeBelow(until, this.length)) {
      this.#waiting.push({ kind: "l2", ...table });
    }
  }

  /** @param isLast nothing but tables will be written any more */
  #takeRefcounts(isLast = false): void {
    if (this.#hasBase && !isLast) return;
    for (const block of this.#refcounts.takeComplete(this.length)) {
      this.#waiting.push({ kind: "refcounts", ...block });
    }
  }

  /**
   * Writes waiting tables when they make up a segment, after the open data segment if that is long enough. If it
   * stays short while more and more tables wait (a huge disk with little data), it is padded: the padding is less
   * than a sixth of the tables then, memory stays bounded, and no segment is too small for a part of an S3 upload.
   */
  async #writeTablesWhenDue(): Promise<void> {
    this.#takeRefcounts();
    const isDue = (segments: number): boolean =>
      this.#waiting.length * this.#clusterSize >= this.#segmentBytes * segments;
    if (!isDue(1)) return;
    const open = this.#segments.openLength;
    const missing = Math.ceil(this.#segmentBytes * LEAST_SEGMENT) - open;
    if (open > 0 && missing > 0) {
      if (!isDue(PATIENCE)) return;
      await this.#segments.pad(missing);
    }
    await this.#endData();
    while (isDue(1)) {
      await this.#writeWaiting(Math.ceil(this.#segmentBytes / this.#clusterSize));
      this.#segments.close("table");
    }
  }

  /** Ends the open data segment at a cluster boundary. What pads it is referred to by nothing. */
  async #endData(): Promise<void> {
    await this.#segments.pad(roundUp(this.length, this.#clusterSize) - this.length);
    this.#segments.close("data");
  }

  async #writeWaiting(count: number): Promise<void> {
    for (const { kind, index, bytes } of this.#waiting.splice(0, count)) {
      if (kind === "l2") this.#placeL2(index, this.length);
      else this.#refcounts.place(index, this.length);
      this.#refcounts.count(this.length, bytes.length);
      await this.#writeTable(bytes);
    }
  }

  #placeL2(index: number, at: number): void {
    encodeL1Entry(this.#l1, index, at);
    if (decodeL1Entry(this.#l1, index) !== at) {
      throw new ImageWriteError(`L2 table ${index} cannot lie at byte ${at}`);
    }
    this.#l2Tables += 1;
  }

  /** Writes L1, padded to whole clusters, after reading it back. */
  async #writeL1(): Promise<void> {
    let found = 0;
    for (let index = 0; index < this.#l1.length / ENTRY_BYTES; index += 1) {
      const at = decodeL1Entry(this.#l1, index);
      if (at !== 0 && at < this.length) found += 1;
      else if (at !== 0) throw new ImageWriteError(`L1 entry ${index} is damaged in memory`);
    }
    if (found !== this.#l2Tables) {
      throw new ImageWriteError(`its L1 table names ${found} L2 tables instead of ${this.#l2Tables}`);
    }
    const padding = Buffer.alloc(roundUp(this.#l1.length, this.#clusterSize) - this.#l1.length);
    this.#refcounts.count(this.length, this.#l1.length);
    await this.#writeTable(Buffer.concat([this.#l1, padding]));
  }

  /** Writes whole clusters into the open table segment, ending it first where it has its length. */
  async #writeTable(bytes: Buffer): Promise<void> {
    if (this.#segments.openLength >= this.#segmentBytes) this.#segments.close("table");
    await this.#segments.write(bytes);
  }
}
