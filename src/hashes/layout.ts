import { ByteReader, ByteWriter } from "../bytes/index.js";

/** Bytes of a hash. */
export const HASH_BYTES = 16;
export const KEY_BYTES = 16;
export const SHA256_BYTES = 32;

/** Clusters that a block describes: as many as an L2 table of clusters of 64 KiB maps. */
export const CLUSTERS_PER_BLOCK = 8192;

const MAGIC = Buffer.from("tidehash", "latin1");
const VERSION = 1;

/** Bytes of the header, and of the head that the sink of a HashWriter has. */
export const HASHES_HEADER_BYTES = 104;
/** Bytes of an entry of the index. */
export const INDEX_ENTRY_BYTES = 40;

/** Bytes of a file of hashes. @param blocks that describe anything */
export function hashesLength(dataClusters: number, blocks: number): number {
  const perBlock = CLUSTERS_PER_BLOCK / 4 + INDEX_ENTRY_BYTES;
  return HASHES_HEADER_BYTES + dataClusters * HASH_BYTES + blocks * perBlock;
}

/** What a file of hashes says about itself. */
export interface HashesHeader {
  readonly clusterSize: number;
  readonly virtualSize: number;
  readonly key: Buffer;
  readonly dataClusters: number;
  readonly zeroClusters: number;
  readonly indexOffset: number;
  readonly blocks: number;
  /** SHA-256 of the index, binary. */
  readonly indexDigest: Buffer;
}

/**
 * Header, big-endian:
 *
 *      0  8  "tidehash"
 *      8  4  version, 1
 *     12  4  bytes of a cluster
 *     16  8  bytes of the disk
 *     24 16  key
 *     40  8  clusters that hold data
 *     48  8  clusters that are explicitly zero
 *     56  8  offset of the index
 *     64  4  entries of the index
 *     68  4  clusters that a block describes, 8192
 *     72 32  SHA-256 of the index
 */
export function encodeHashesHeader(header: HashesHeader): Buffer {
  return new ByteWriter(HASHES_HEADER_BYTES)
    .bytes(MAGIC)
    .u32(VERSION)
    .u32(header.clusterSize)
    .u64(header.virtualSize)
    .bytes(header.key)
    .u64(header.dataClusters)
    .u64(header.zeroClusters)
    .u64(header.indexOffset)
    .u32(header.blocks)
    .u32(CLUSTERS_PER_BLOCK)
    .bytes(header.indexDigest)
    .finish();
}

/** @returns the header, or why it is none */
export function decodeHashesHeader(bytes: Buffer): HashesHeader | string {
  const reader = new ByteReader(bytes);
  if (!reader.bytes(MAGIC.length).equals(MAGIC)) return "it is no file of hashes";
  const version = reader.u32();
  if (version !== VERSION) return `it has version ${version}, this tidemark knows ${VERSION}`;
  const header: HashesHeader & { perBlock: number } = {
    clusterSize: reader.u32(),
    virtualSize: reader.size64(),
    key: Buffer.from(reader.bytes(KEY_BYTES)),
    dataClusters: reader.size64(),
    zeroClusters: reader.size64(),
    indexOffset: reader.size64(),
    blocks: reader.u32(),
    perBlock: reader.u32(),
    indexDigest: Buffer.from(reader.bytes(SHA256_BYTES)),
  };
  if (header.perBlock !== CLUSTERS_PER_BLOCK) return `its blocks describe ${header.perBlock} clusters`;
  return header;
}

/** Entry of the index: number of the block (4 bytes), its length (4), its SHA-256 (32). */
export interface IndexEntry {
  readonly block: number;
  readonly length: number;
  readonly digest: Buffer;
}

export function encodeIndexEntry({ block, length, digest }: IndexEntry): Buffer {
  return new ByteWriter(INDEX_ENTRY_BYTES).u32(block).u32(length).bytes(digest).finish();
}

/** Entry `position` of an index. The digest is a view. */
export function decodeIndexEntry(index: Buffer, position: number): IndexEntry {
  const at = position * INDEX_ENTRY_BYTES;
  const reader = new ByteReader(index.subarray(at, at + INDEX_ENTRY_BYTES));
  return { block: reader.u32(), length: reader.u32(), digest: reader.bytes(SHA256_BYTES) };
}
