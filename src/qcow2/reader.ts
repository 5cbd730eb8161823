import { MiB, type ByteSource, type IoOptions } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import type { ClusterFormat } from "./cluster.js";
import { decodeL1Entry, decodeL2Entry, endOfSame, type L2Entry } from "./entry.js";
import { ImageDamageError } from "./errors.js";
import type { ImageIdentity } from "./identity.js";
import { readHead, type ImageHead } from "./image-head.js";
import { ENTRY_BYTES, l1EntriesFor, l2EntriesOf, MAX_L1_BYTES, SECTOR, type Compression } from "./layout.js";
import { clip, join, type CompressedMapping, type Mapping, type PlainMapping } from "./mapping.js";
import { TableCache } from "./table-cache.js";

export interface ImageReaderOptions extends IoOptions {
  /** What to call the image in messages and in damages; default "image". */
  readonly name?: string | undefined;
  /** Most bytes of L2 tables kept in memory; default 16 MiB. */
  readonly cacheBytes?: number | undefined;
  /** The same image where header and tables are concerned: who vouches for them may refuse other bytes. Default `source`. */
  readonly tables?: ByteSource | undefined;
}

/**
 * Reads the mapping of one qcow2 image (docs/interop/qcow2.txt of QEMU), written by tidemark or by QEMU: version 2
 * and 3, clusters of 512 bytes to 2 MiB, zlib and zstd. Internal snapshots are ignored.
 *
 * Header and tables are read through one source alone and trusted as far as that is; that they keep to the
 * format and to the file is checked on every use. Data is not read here: see ImageChain and ClusterDecoder.
 */
export class ImageReader {
  readonly name: string;
  readonly source: ByteSource;
  /** Bytes of the disk. */
  readonly virtualSize: number;
  /** Bytes of a cluster. */
  readonly clusterSize: number;
  readonly compression: Compression;
  /** Name of the backing file as the header has it. */
  readonly backingFile: string | undefined;
  readonly backingFormat: string | undefined;
  /** What the image says about itself; undefined when tidemark did not write it. */
  readonly identity: ImageIdentity | undefined;
  readonly #version: number;
  readonly #clusterBits: number;
  readonly #tables: ByteSource;
  readonly #l1: Buffer;
  readonly #cache: TableCache;

  private constructor(source: ByteSource, head: ImageHead, l1: Buffer, options: ImageReaderOptions) {
    this.name = options.name ?? "image";
    this.source = source;
    this.#tables = options.tables ?? source;
    this.virtualSize = head.header.size;
    this.clusterSize = 2 ** head.header.clusterBits;
    this.compression = head.header.compression;
    this.backingFile = head.backingFile;
    this.backingFormat = head.backingFormat;
    this.identity = head.identity;
    this.#version = head.header.version;
    this.#clusterBits = head.header.clusterBits;
    this.#l1 = l1;
    this.#cache = new TableCache(options.cacheBytes ?? 16 * MiB);
  }

  /**
   * Reads the header cluster and the L1 table.
   *
   * @throws {ImageDamageError} when they contradict the format or the file's length
   * @throws {UnsupportedImageError} for what this reader does not do: see decodeHeader
   */
  static async open(source: ByteSource, options: ImageReaderOptions = {}): Promise<ImageReader> {
    options.signal?.throwIfAborted();
    const { name = "image", tables = source } = options;
    const head = await readHead(tables, name, options);
    const { size, clusterBits, l1Size, l1TableOffset } = head.header;
    const needed = l1EntriesFor(size, 2 ** clusterBits);
    if (l1Size * ENTRY_BYTES > MAX_L1_BYTES || l1Size < needed) {
      throw new ImageDamageError(
        name,
        `its L1 table has ${l1Size} entries, ${needed} to ${MAX_L1_BYTES / ENTRY_BYTES} are expected`,
      );
    }
    const length = needed * ENTRY_BYTES;
    if (l1TableOffset % 2 ** clusterBits !== 0 || l1TableOffset + length > source.length) {
      throw new ImageDamageError(
        name,
        `its L1 table at byte ${l1TableOffset} is not aligned or exceeds the file of ${source.length} bytes`,
      );
    }
    const l1 = length === 0 ? Buffer.alloc(0) : await tables.read(l1TableOffset, length, options);
    return new ImageReader(source, head, l1, options);
  }

  /** How the image's data clusters are stored, for a ClusterDecoder. */
  get format(): ClusterFormat {
    const { clusterSize, compression } = this;
    return { clusterSize, compression, requireChecksum: this.identity !== undefined };
  }

  /**
   * Maps [offset, offset + length): runs in order that cover the whole range.
   *
   * @throws {UsageError} when the range exceeds the disk
   * @throws {ImageDamageError} when a table contradicts the format or the file's length
   */
  async *map(offset: number, length: number, options: IoOptions = {}): AsyncGenerator<Mapping, void, void> {
    requireRange(this.name, this.virtualSize, offset, length);
    const end = offset + length;
    let run: Mapping | undefined;
    for (let next = offset; next < end;) {
      options.signal?.throwIfAborted();
      const found = this.runAt(next, end, options);
      const piece = found instanceof Promise ? await found : found;
      next += piece.length;
      const longer = run === undefined ? piece : join(run, piece);
      if (longer === undefined && run !== undefined) yield run;
      run = longer ?? piece;
    }
    if (run !== undefined) yield run;
  }

  /**
   * The run that begins at `offset`, within what one L2 table maps. It is there at once, without a promise, when that
   * table is in memory: a disk has millions of clusters, and a promise costs more than looking one up.
   *
   * @param end no more than the virtual size, and more than `offset`
   */
  runAt(offset: number, end: number, options: IoOptions = {}): Mapping | Promise<Mapping> {
    const covered = this.clusterSize * l2EntriesOf(this.clusterSize);
    const index = Math.floor(offset / covered);
    const at = this.#tableAt(index);
    if (at === 0) return this.#hole(offset, end, index, covered);
    const stop = Math.min(end, (index + 1) * covered);
    const table = this.#cache.get(at);
    if (table !== undefined) return this.#runIn(table, offset, stop);
    return this.#readTable(at, options).then((read) => this.#runIn(read, offset, stop));
  }

  /** A run across L1 entries, from `index` on, that name no table. */
  #hole(offset: number, end: number, index: number, covered: number): Mapping {
    let next = index + 1;
    while (next * covered < end && this.#tableAt(next) === 0) next += 1;
    return { offset, length: Math.min(end, next * covered) - offset, kind: "unallocated" };
  }

  /** Host offset of an L2 table; 0 when there is none. */
  #tableAt(index: number): number {
    const at = decodeL1Entry(this.#l1, index);
    if (at === 0) return 0;
    const isAligned = at % this.clusterSize === 0; // false for NaN, too
    if (!isAligned || at + this.clusterSize > this.source.length) {
      throw new ImageDamageError(
        this.name,
        `L1 entry ${index} names no cluster of the file of ${this.source.length} bytes`,
      );
    }
    return at;
  }

  async #readTable(at: number, options: IoOptions): Promise<Buffer> {
    const read = await this.#tables.read(at, this.clusterSize, options);
    const table = read.byteOffset % 4 === 0 ? read : Buffer.from(new Uint8Array(read).buffer);
    this.#cache.set(at, table);
    return table;
  }

  #runIn(table: Buffer, offset: number, end: number): Mapping {
    const first = Math.floor(offset / this.clusterSize);
    const entry = this.#entry(table, first);
    const start = first * this.clusterSize;
    switch (entry.kind) {
      case "compressed": {
        const { at } = entry;
        // Sectors count from the start of the first one; the last one may reach beyond the file's end.
        const stop = Math.min((Math.floor(at / SECTOR) + entry.sectors) * SECTOR, this.source.length);
        const run: CompressedMapping = {
          offset: start,
          length: this.clusterSize,
          kind: "compressed",
          at,
          storedLength: stop - at,
          skip: 0,
        };
        return clip(run, offset, end);
      }
      case "plain": {
        const length = this.#contiguous(table, first, entry.at, end);
        return this.#requireStored(clip({ offset: start, length, kind: "plain", at: entry.at }, offset, end));
      }
      case "unallocated":
      case "zero": {
        const base = first - (first % l2EntriesOf(this.clusterSize));
        const stop = base + endOfSame(table, first - base, Math.ceil(end / this.clusterSize) - base);
        return clip(
          { offset: start, length: stop * this.clusterSize - start, kind: entry.kind },
          offset,
          end,
        );
      }
    }
  }

  /** Bytes of the plain clusters from `first` on, below `end`, that follow one another in the file as well. */
  #contiguous(table: Buffer, first: number, at: number, end: number): number {
    let length = this.clusterSize;
    for (let next = first + 1; next * this.clusterSize < end; next += 1) {
      const entry = this.#entry(table, next);
      if (entry.kind !== "plain" || entry.at !== at + length) break;
      length += this.clusterSize;
    }
    return length;
  }

  /** A file may end inside its last data cluster, but not before the bytes of the disk in it. */
  #requireStored(run: PlainMapping): PlainMapping {
    if (run.at + run.length <= this.source.length) return run;
    throw new ImageDamageError(
      this.name,
      `its data up to byte ${run.at + run.length} exceeds the file of ${this.source.length} bytes`,
    );
  }

  /** The entry of a guest cluster, its offset bounded by the file. */
  #entry(table: Buffer, cluster: number): Exclude<L2Entry, { kind: "invalid" }> {
    const slot = cluster % l2EntriesOf(this.clusterSize);
    const entry = decodeL2Entry(table, slot, this.#clusterBits, this.#version);
    if (entry.kind === "unallocated" || entry.kind === "zero") return entry;
    if (entry.kind === "invalid") this.#refuse(cluster, entry.why);
    if (entry.at < this.clusterSize) this.#refuse(cluster, "it points into the header");
    if (entry.at >= this.source.length) {
      this.#refuse(
        cluster,
        `byte ${entry.at} lies beyond the end of the file of ${this.source.length} bytes`,
      );
    }
    return entry;
  }

  #refuse(cluster: number, why: string): never {
    throw new ImageDamageError(this.name, `the L2 entry of cluster ${cluster} is damaged: ${why}`);
  }
}

/** @throws {UsageError} when [offset, offset + length) does not lie within a disk of `virtualSize` bytes */
export function requireRange(name: string, virtualSize: number, offset: number, length: number): void {
  if (offset >= 0 && length >= 0 && offset + length <= virtualSize) return;
  throw new UsageError(
    `Cannot read ${length} bytes at ${offset} of "${name}": the disk has ${virtualSize} bytes`,
  );
}
