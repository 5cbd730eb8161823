import { roundUp } from "../bytes/index.js";
import { ImageWriteError } from "./errors.js";
import { ENTRY_BYTES, MAX_REFCOUNT_TABLE_BYTES } from "./layout.js";

/** refcount_order: entries of 16 bits, as every qcow2 reader knows them. */
export const REFCOUNT_ORDER = 4;
const REFCOUNT_BYTES = 2;
const MAX_REFCOUNT = 0xffff;

/** A refcount block that is ready to be written. */
export interface RefcountBlock {
  readonly index: number;
  readonly bytes: Buffer;
}

/** Where the last refcount blocks and the refcount table go, right behind each other. */
export interface RefcountEnd {
  readonly blocks: readonly RefcountBlock[];
  readonly table: Buffer;
  readonly tableOffset: number;
  readonly tableClusters: number;
}

/** Clusters of the refcount blocks and their table in a file whose other parts end at `position`, a multiple of the cluster. */
export function refcountClusters(position: number, clusterSize: number): number {
  const { total, tableClusters } = layOut(position, clusterSize, 0);
  return total + tableClusters;
}

/**
 * How many blocks describe a file, themselves included, and the clusters of the table that names them.
 *
 * @param position end of everything but the blocks that are not placed yet, and the table
 * @param placed blocks that lie below it already
 */
function layOut(
  position: number,
  clusterSize: number,
  placed: number,
): { readonly total: number; readonly tableClusters: number } {
  const entries = clusterSize / REFCOUNT_BYTES;
  let total = 0;
  let tableClusters = 0;
  for (let needed = Math.ceil(position / clusterSize / entries); needed > total;) {
    total = needed;
    tableClusters = Math.ceil((total * ENTRY_BYTES) / clusterSize);
    const end = position / clusterSize + (total - placed) + tableClusters;
    needed = Math.ceil(end / entries);
  }
  return { total, tableClusters };
}

interface Block {
  readonly bytes: Buffer;
  /** Sum of its entries, kept apart from them to verify them. */
  sum: number;
}

/**
 * Counts references to host clusters while a file is written front to back, so that blocks leave memory once the
 * file has grown past what they describe (specification, "Host cluster management").
 *
 * A compressed cluster refers to every host cluster that its data touches, a table to its own; what is padding
 * stays at 0, which is "free" and no leak.
 */
export class RefcountBuilder {
  readonly #clusterSize: number;
  /** "refcount_block_entries = (cluster_size * 8 / refcount_bits)" */
  readonly #blockEntries: number;
  readonly #blocks = new Map<number, Block>();
  /** Offsets of the refcount blocks that are written, by their index. */
  readonly #offsets = new Map<number, number>();
  #taken = 0;

  constructor(clusterSize: number) {
    this.#clusterSize = clusterSize;
    this.#blockEntries = clusterSize / REFCOUNT_BYTES;
  }

  /** Counts one reference to each host cluster that `length` bytes at `offset` touch. */
  count(offset: number, length: number): void {
    const last = Math.floor((offset + length - 1) / this.#clusterSize);
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster <= last; cluster += 1) {
      const block = this.#block(Math.floor(cluster / this.#blockEntries));
      const at = (cluster % this.#blockEntries) * REFCOUNT_BYTES;
      const value = block.bytes.readUInt16BE(at) + 1;
      if (value > MAX_REFCOUNT) {
        throw new ImageWriteError(`host cluster ${cluster} would have more than ${MAX_REFCOUNT} references`);
      }
      block.bytes.writeUInt16BE(value, at);
      block.sum += 1;
    }
  }

  /** Hands out the blocks that describe nothing at or beyond `position` and so are complete. */
  *takeComplete(position: number): Generator<RefcountBlock> {
    const covered = this.#blockEntries * this.#clusterSize;
    for (; (this.#taken + 1) * covered <= position; this.#taken += 1) yield this.#take(this.#taken);
  }

  /** Records where a block was written. It still has to be counted. */
  place(index: number, offset: number): void {
    this.#offsets.set(index, offset);
  }

  /**
   * Lays out what is left at the end of the file: the blocks not handed out yet, then the table. They are counted
   * themselves, which may take more blocks; the loop ends where the layout describes itself.
   *
   * @param position a multiple of the cluster size: the end of everything else
   */
  finish(position: number): RefcountEnd {
    const placed = this.#offsets.size;
    const { total, tableClusters } = layOut(position, this.#clusterSize, placed);
    if (total * ENTRY_BYTES > MAX_REFCOUNT_TABLE_BYTES) {
      throw new ImageWriteError(`its refcount table would exceed ${MAX_REFCOUNT_TABLE_BYTES} bytes`);
    }
    const clusters = total - placed + tableClusters;
    this.count(position, clusters * this.#clusterSize);

    const blocks: RefcountBlock[] = [];
    for (let index = this.#taken; index < total; index += 1) {
      this.place(index, position + blocks.length * this.#clusterSize);
      blocks.push(this.#take(index));
    }
    const tableOffset = position + blocks.length * this.#clusterSize;
    return { blocks, table: this.#encodeTable(total), tableOffset, tableClusters };
  }

  /** "Bits 9-63 of the offset into the image file at which the refcount block starts." */
  #encodeTable(total: number): Buffer {
    const table = Buffer.alloc(roundUp(total * ENTRY_BYTES, this.#clusterSize));
    for (let index = 0; index < total; index += 1) {
      const offset = this.#offsets.get(index);
      if (offset === undefined) throw new ImageWriteError(`refcount block ${index} was not written`);
      table.writeBigUInt64BE(BigInt(offset), index * ENTRY_BYTES);
    }
    return table;
  }

  #block(index: number): Block {
    let block = this.#blocks.get(index);
    if (block === undefined) {
      if (index < this.#taken) throw new ImageWriteError(`refcount block ${index} has been written already`);
      block = { bytes: Buffer.alloc(this.#clusterSize), sum: 0 };
      this.#blocks.set(index, block);
    }
    return block;
  }

  #take(index: number): RefcountBlock {
    const { bytes, sum } = this.#block(index);
    this.#blocks.delete(index);
    let found = 0;
    for (let at = 0; at < bytes.length; at += REFCOUNT_BYTES) found += bytes.readUInt16BE(at);
    if (found !== sum) {
      throw new ImageWriteError(`refcount block ${index} counts ${found} references instead of ${sum}`);
    }
    return { index, bytes };
  }
}
