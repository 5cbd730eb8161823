import { ImageWriteError } from "./errors.js";
import {
  decodeL2Entry,
  encodeCompressedEntry,
  encodePlainEntry,
  encodeZeroEntries,
  sectorsOf,
} from "./entry.js";
import { clusterBitsOf, ENTRY_BYTES, l2EntriesOf } from "./layout.js";

/** An L2 table that is complete, as far as the writer was told. */
export interface L2Table {
  /** Its index in the L1 table. */
  readonly index: number;
  readonly bytes: Buffer;
}

interface ActiveTable {
  bytes: Buffer;
  /** Entries made, kept apart from the bytes to verify them. */
  data: number;
  zero: number;
}

/**
 * The L2 tables of an image in writing. A table stays in memory from its first entry until it is taken; tables
 * that are zero clusters from end to end share one buffer, so that a discarded disk of any size costs nothing.
 */
export class TableBuilder {
  readonly #clusterSize: number;
  readonly #clusterBits: number;
  readonly #entries: number;
  readonly #active = new Map<number, ActiveTable>();
  readonly #allZero: Buffer;
  #taken = 0;

  constructor(clusterSize: number) {
    this.#clusterSize = clusterSize;
    this.#clusterBits = clusterBitsOf(clusterSize);
    this.#entries = l2EntriesOf(clusterSize);
    this.#allZero = Buffer.alloc(clusterSize);
    encodeZeroEntries(this.#allZero, 0, this.#entries);
  }

  /** Maps a guest cluster to `length` compressed bytes at the host offset `at`. */
  setCompressed(cluster: number, at: number, length: number): void {
    const table = this.#table(Math.floor(cluster / this.#entries));
    const slot = cluster % this.#entries;
    this.#requireFree(table, slot, 1, cluster);
    encodeCompressedEntry(table.bytes, slot, this.#clusterBits, at, length);
    table.data += 1;
    const entry = decodeL2Entry(table.bytes, slot, this.#clusterBits, 3);
    if (entry.kind !== "compressed" || entry.at !== at || entry.sectors !== sectorsOf(at, length)) {
      throw new ImageWriteError(`${length} bytes at ${at} do not fit in the L2 entry of cluster ${cluster}`);
    }
  }

  /** Maps a guest cluster to a host cluster that holds it as it is. */
  setPlain(cluster: number, at: number): void {
    const table = this.#table(Math.floor(cluster / this.#entries));
    const slot = cluster % this.#entries;
    this.#requireFree(table, slot, 1, cluster);
    encodePlainEntry(table.bytes, slot, at);
    table.data += 1;
    const entry = decodeL2Entry(table.bytes, slot, this.#clusterBits, 3);
    if (entry.kind !== "plain" || entry.at !== at) {
      throw new ImageWriteError(`host offset ${at} does not fit in the L2 entry of cluster ${cluster}`);
    }
  }

  /** Makes `count` guest clusters explicit zero clusters. */
  setZero(cluster: number, count: number): void {
    const end = cluster + count;
    for (let next = cluster; next < end;) {
      const index = Math.floor(next / this.#entries);
      const slot = next % this.#entries;
      const run = Math.min(this.#entries - slot, end - next);
      if (run === this.#entries && index >= this.#taken && !this.#active.has(index)) {
        this.#active.set(index, { bytes: this.#allZero, data: 0, zero: run });
      } else {
        const table = this.#table(index);
        this.#requireFree(table, slot, run, next);
        encodeZeroEntries(table.bytes, slot, run);
        table.zero += run;
      }
      next += run;
    }
  }

  /**
   * Hands out the tables below the L1 index `until`, in order, each verified.
   *
   * @param position end of the file as written: no entry may reach beyond it
   */
  *takeBelow(until: number, position: number): Generator<L2Table> {
    for (; this.#taken < until; this.#taken += 1) {
      const table = this.#active.get(this.#taken);
      if (table === undefined) continue;
      this.#active.delete(this.#taken);
      this.#verify(this.#taken, table, position);
      yield { index: this.#taken, bytes: table.bytes };
    }
  }

  #table(index: number): ActiveTable {
    if (index < this.#taken) throw new ImageWriteError(`L2 table ${index} has been written already`);
    let table = this.#active.get(index);
    if (table === undefined) {
      table = { bytes: Buffer.alloc(this.#clusterSize), data: 0, zero: 0 };
      this.#active.set(index, table);
    }
    return table;
  }

  #requireFree(table: ActiveTable, slot: number, count: number, cluster: number): void {
    for (let i = 0; i < count; i += 1) {
      if (table.bytes.readBigUInt64BE((slot + i) * ENTRY_BYTES) !== 0n) {
        throw new ImageWriteError(`cluster ${cluster + i} is written twice`);
      }
    }
  }

  /** Reads a table back with the reader's code before it is written. */
  #verify(index: number, table: ActiveTable, position: number): void {
    let data = 0;
    let zero = 0;
    for (let slot = 0; slot < this.#entries; slot += 1) {
      const entry = decodeL2Entry(table.bytes, slot, this.#clusterBits, 3);
      if (entry.kind === "zero") zero += 1;
      else if (entry.kind !== "unallocated") {
        const isWithin = entry.kind !== "invalid" && entry.at >= this.#clusterSize && entry.at < position;
        if (!isWithin) throw new ImageWriteError(`L2 table ${index} is damaged in memory`);
        data += 1;
      }
    }
    if (data !== table.data || zero !== table.zero) {
      throw new ImageWriteError(
        `L2 table ${index} maps ${data} data and ${zero} zero clusters instead of ${table.data} and ${table.zero}`,
      );
    }
  }
}
