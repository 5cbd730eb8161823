/**
 * Entries of L1 and L2 tables, as halves of 32 bits: a disk of 16 TiB has a quarter of a billion of them, and
 * bigint arithmetic on each would take longer than reading the tables. The masks below are the specification's.
 */
import { ENTRY_BYTES, SECTOR } from "./layout.js";

const HIGH_UNIT = 2 ** 32;

/** A mask of the specification, as halves. */
function halves(mask: bigint): { readonly high: number; readonly low: number } {
  return { high: Number(mask >> 32n), low: Number(mask & 0xffff_ffffn) };
}

/**
 * L1 table entry: "Bits 9-55 of the offset into the image file at which the L2 table starts."
 * Standard Cluster Descriptor: "Bits 9-55 of host cluster offset. Must be aligned to a cluster boundary."
 */
const OFFSET_MASK = halves(0x00ff_ffff_ffff_fe00n);

/** L1 table entry: bits 0-8 and 56-62 are "Reserved (set to 0)". */
const L1_RESERVED = halves(0x7f00_0000_0000_01ffn);

/** L2 table entry: "Bit 62: 0 for standard clusters, 1 for compressed clusters". */
const L2_COMPRESSED = halves(0x4000_0000_0000_0000n);

/** Bit 63: "1 if its refcount is exactly one" (L1), "1 for standard clusters whose refcount is exactly one" (L2). */
const COPIED = halves(0x8000_0000_0000_0000n);

/** Standard Cluster Descriptor, bit 0: "If set to 1, the cluster reads as all zeros." */
const L2_ZERO = halves(0x0000_0000_0000_0001n);

/** Standard Cluster Descriptor: bits 1-8 and 56-61 are "Reserved (set to 0)". */
const L2_RESERVED = halves(0x3f00_0000_0000_01fen);

/** What an L2 entry says about its cluster. */
export type L2Entry =
  | { readonly kind: "unallocated" }
  | { readonly kind: "zero" }
  | { readonly kind: "plain"; readonly at: number }
  /** `sectors`: the number of 512-byte sectors that the compressed data touches. */
  | { readonly kind: "compressed"; readonly at: number; readonly sectors: number }
  | { readonly kind: "invalid"; readonly why: string };

const UNALLOCATED: L2Entry = { kind: "unallocated" };
const ZERO: L2Entry = { kind: "zero" };

/**
 * Reads the L2 entry `index` of a table. Compressed Clusters Descriptor (x = 62 - (cluster_bits - 8)):
 *
 *     0 - x-1   "Host cluster offset. ... If cluster_bits is small enough that this field includes bits
 *               beyond 55, those upper bits must be set to 0."
 *     x - 61    "Number of additional 512-byte sectors used for the compressed data, beyond the sector
 *               containing the offset in the previous field."
 *
 * @param version of the image: version 2 knows no zero clusters
 */
export function decodeL2Entry(table: Buffer, index: number, clusterBits: number, version: number): L2Entry {
  const high = table.readUInt32BE(index * ENTRY_BYTES);
  const low = table.readUInt32BE(index * ENTRY_BYTES + 4);
  if (high === 0 && low === 0) return UNALLOCATED;
  const copied = (high & COPIED.high) !== 0;
  if ((high & L2_COMPRESSED.high) !== 0) {
    if (copied) return { kind: "invalid", why: "bit 63 is set on a compressed cluster" };
    const shift = 62 - (clusterBits - 8) - 32;
    const atHigh = high & (2 ** shift - 1);
    if (atHigh >= 1 << 24) return { kind: "invalid", why: "a compressed cluster lies beyond bit 55" };
    const sectors = ((high & (L2_COMPRESSED.high - 1)) >>> shift) + 1;
    return { kind: "compressed", at: atHigh * HIGH_UNIT + low, sectors };
  }
  if ((high & L2_RESERVED.high) !== 0 || (low & L2_RESERVED.low) !== 0) {
    return { kind: "invalid", why: "reserved bits are set" };
  }
  if ((low & L2_ZERO.low) !== 0) {
    return version < 3 ? { kind: "invalid", why: "a version 2 image has no zero clusters" } : ZERO;
  }
  const at = (high & OFFSET_MASK.high) * HIGH_UNIT + ((low & OFFSET_MASK.low) >>> 0);
  if (at === 0) return { kind: "invalid", why: "bit 63 is set without an offset" };
  if (at % 2 ** clusterBits !== 0) return { kind: "invalid", why: "its offset is not aligned to a cluster" };
  return { kind: "plain", at };
}

/**
 * Index of the first entry from `first` on, below `end`, that has other bits than `first`; `end` when there is none.
 * Unallocated and zero clusters come in millions: this is many times as fast as decoding them.
 *
 * @param table aligned in memory to 4 bytes
 */
export function endOfSame(table: Buffer, first: number, end: number): number {
  const words = new Uint32Array(table.buffer, table.byteOffset, table.length / 4);
  const a = words[first * 2];
  const b = words[first * 2 + 1];
  let index = first + 1;
  while (index < end && words[index * 2] === a && words[index * 2 + 1] === b) index += 1;
  return index;
}

/** Writes the entry of a compressed cluster of `length` bytes at the host offset `at`. */
export function encodeCompressedEntry(
  table: Buffer,
  index: number,
  clusterBits: number,
  at: number,
  length: number,
): void {
  const sectors = sectorsOf(at, length);
  const shift = 62 - (clusterBits - 8) - 32;
  const high = L2_COMPRESSED.high + (sectors - 1) * 2 ** shift + Math.floor(at / HIGH_UNIT);
  table.writeUInt32BE(high, index * ENTRY_BYTES);
  table.writeUInt32BE(at % HIGH_UNIT, index * ENTRY_BYTES + 4);
}

/** Writes the entry of a cluster stored as it is, at a host offset aligned to a cluster, with a refcount of one. */
export function encodePlainEntry(table: Buffer, index: number, at: number): void {
  table.writeUInt32BE(COPIED.high + Math.floor(at / HIGH_UNIT), index * ENTRY_BYTES);
  table.writeUInt32BE(at % HIGH_UNIT, index * ENTRY_BYTES + 4);
}

/** Writes explicit zero clusters: they hide the backing file's data. */
export function encodeZeroEntries(table: Buffer, index: number, count: number): void {
  for (let i = index; i < index + count; i += 1) {
    table.writeUInt32BE(L2_ZERO.high, i * ENTRY_BYTES);
    table.writeUInt32BE(L2_ZERO.low, i * ENTRY_BYTES + 4);
  }
}

/** Number of 512-byte sectors that `length` bytes at `at` touch. */
export function sectorsOf(at: number, length: number): number {
  return Math.floor((at + length - 1) / SECTOR) - Math.floor(at / SECTOR) + 1;
}

/** The offset of the L2 table that L1 entry `index` names: 0 when there is none, NaN when reserved bits are set. */
export function decodeL1Entry(table: Buffer, index: number): number {
  const high = table.readUInt32BE(index * ENTRY_BYTES);
  const low = table.readUInt32BE(index * ENTRY_BYTES + 4);
  if ((high & L1_RESERVED.high) !== 0 || (low & L1_RESERVED.low) !== 0) return Number.NaN;
  return (high & OFFSET_MASK.high) * HIGH_UNIT + ((low & OFFSET_MASK.low) >>> 0);
}

/** Writes an L1 entry that names an L2 table of its own: "1 if its refcount is exactly one". */
export function encodeL1Entry(table: Buffer, index: number, at: number): void {
  table.writeUInt32BE(COPIED.high + Math.floor(at / HIGH_UNIT), index * ENTRY_BYTES);
  table.writeUInt32BE(at % HIGH_UNIT, index * ENTRY_BYTES + 4);
}
