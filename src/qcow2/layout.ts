import { KiB, MiB } from "../bytes/index.js";

/** "QFI\xfb": the first four bytes of every qcow2 file. */
export const QCOW_MAGIC = 0x514649fb;

/** Header extension types (specification, "Header extensions"). */
export const QCOW2_EXT_END = 0x00000000;
export const QCOW2_EXT_BACKING_FORMAT = 0xe2792aca;

/** Our own extension: ASCII "tide". Its data is the JSON text of an ImageIdentity. */
export const QCOW2_EXT_TIDEMARK = 0x74696465;

/** incompatible_features (specification, "Header"). */
export const QCOW2_INCOMPAT_DIRTY = 1n << 0n;
export const QCOW2_INCOMPAT_CORRUPT = 1n << 1n;
export const QCOW2_INCOMPAT_DATA_FILE = 1n << 2n;
export const QCOW2_INCOMPAT_COMPRESSION = 1n << 3n;
export const QCOW2_INCOMPAT_EXTL2 = 1n << 4n;

/** compression_type (specification, "Additional fields"): its index is its number in the header. */
export const COMPRESSION_TYPES = ["zlib", "zstd"] as const;
export type Compression = (typeof COMPRESSION_TYPES)[number];

/** Limits of the format and of QEMU; both sides honour them. */
export const MIN_CLUSTER_BITS = 9;
export const MAX_CLUSTER_BITS = 21;
export const MAX_L1_BYTES = 32 * MiB;
export const MAX_REFCOUNT_TABLE_BYTES = 8 * MiB;
export const MAX_BACKING_NAME_BYTES = 1023;

/** Bytes of a cluster, and of a dirty bitmap's granule, where nothing else is asked for: QEMU's default. */
export const DEFAULT_CLUSTER_SIZE = 64 * KiB;

/** The smallest cluster we write: below it, an incompressible frame has no room in an L2 entry's sector count. */
export const MIN_WRITTEN_CLUSTER = 4 * KiB;

/** "Number of additional 512-byte sectors used for the compressed data". */
export const SECTOR = 512;

/** Bytes of an L1, L2 or refcount table entry. */
export const ENTRY_BYTES = 8;

/** log2 of a cluster size. @param clusterSize a power of two */
export function clusterBitsOf(clusterSize: number): number {
  return 31 - Math.clz32(clusterSize);
}

/** Clusters that an L2 table maps: "l2_entries = (cluster_size / sizeof(uint64_t))". */
export function l2EntriesOf(clusterSize: number): number {
  return clusterSize / ENTRY_BYTES;
}

/** Entries that the L1 table of a disk of `virtualSize` bytes needs. */
export function l1EntriesFor(virtualSize: number, clusterSize: number): number {
  return Math.ceil(virtualSize / (clusterSize * l2EntriesOf(clusterSize)));
}
