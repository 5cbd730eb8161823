import { ByteReader, ByteWriter } from "../bytes/index.js";
import { ImageDamageError, UnsupportedImageError } from "./errors.js";
import {
  COMPRESSION_TYPES,
  MAX_BACKING_NAME_BYTES,
  MAX_CLUSTER_BITS,
  MIN_CLUSTER_BITS,
  QCOW2_INCOMPAT_COMPRESSION,
  QCOW2_INCOMPAT_CORRUPT,
  QCOW2_INCOMPAT_DATA_FILE,
  QCOW2_INCOMPAT_DIRTY,
  QCOW2_INCOMPAT_EXTL2,
  QCOW_MAGIC,
  type Compression,
} from "./layout.js";

/** Length of the header of version 2. */
const V2_HEADER_LENGTH = 72;

/** Length of the header that we write: all fields that we know. */
export const HEADER_LENGTH = 112;

/** The least header_length of version 3. */
const V3_MIN_HEADER_LENGTH = 104;

/** Fields of the header, named as in the specification. */
export interface Header {
  readonly version: 2 | 3;
  readonly backingFileOffset: number;
  readonly backingFileSize: number;
  readonly clusterBits: number;
  /** Virtual disk size in bytes. */
  readonly size: number;
  readonly l1Size: number;
  readonly l1TableOffset: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
  readonly refcountOrder: number;
  readonly headerLength: number;
  readonly compression: Compression;
}

/**
 * Encodes a version 3 header of 112 bytes (specification, "Header"): no snapshots, no encryption, and of the
 * incompatible features only bit 3, which goes with a compression type other than zlib.
 */
export function encodeHeader(header: Header): Buffer {
  const compressionType = COMPRESSION_TYPES.indexOf(header.compression);
  return new ByteWriter(HEADER_LENGTH)
    .u32(QCOW_MAGIC)
    .u32(header.version)
    .u64(header.backingFileOffset)
    .u32(header.backingFileSize)
    .u32(header.clusterBits)
    .u64(header.size)
    .u32(0) // crypt_method
    .u32(header.l1Size)
    .u64(header.l1TableOffset)
    .u64(header.refcountTableOffset)
    .u32(header.refcountTableClusters)
    .u32(0) // nb_snapshots
    .u64(0) // snapshots_offset
    .u64(compressionType === 0 ? 0n : QCOW2_INCOMPAT_COMPRESSION)
    .u64(0) // compatible_features
    .u64(0) // autoclear_features
    .u32(header.refcountOrder)
    .u32(header.headerLength)
    .u8(compressionType)
    .skip(7)
    .finish();
}

/**
 * Decodes the header of an image, of version 2 or 3. Fields that lead to something this reader never reads
 * (refcounts, snapshots) are not judged.
 *
 * @param bytes the file's first bytes, at least 112 where the file has as many
 * @param object name of the image, for messages
 * @throws {ImageDamageError} when it is no qcow2 header or contradicts itself
 * @throws {UnsupportedImageError} for encryption, external data files, extended L2 entries, the dirty and corrupt
 *   bits, unknown incompatible features, unknown versions and compression types
 */
export function decodeHeader(bytes: Buffer, object: string): Header {
  if (bytes.length < V2_HEADER_LENGTH || bytes.readUInt32BE(0) !== QCOW_MAGIC) {
    throw new ImageDamageError(object, "it does not begin with a qcow2 header");
  }
  const reader = new ByteReader(bytes).skip(4);
  try {
    return decodeFields(reader, object);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new ImageDamageError(object, `its header is damaged: ${error.message}`, { cause: error });
  }
}

function decodeFields(reader: ByteReader, object: string): Header {
  const version = reader.u32();
  if (version !== 2 && version !== 3) throw new UnsupportedImageError(object, `has qcow2 version ${version}`);
  const backingFileOffset = reader.size64();
  const backingFileSize = reader.u32();
  const clusterBits = reader.u32();
  const size = reader.size64();
  const cryptMethod = reader.u32();
  const l1Size = reader.u32();
  const l1TableOffset = reader.size64();
  const refcountTableOffset = reader.size64();
  const refcountTableClusters = reader.u32();
  reader.skip(12); // nb_snapshots, snapshots_offset: only the active tables are read
  const features = version === 2 ? VERSION_2_FEATURES : decodeFeatures(reader, object);

  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw new RangeError(`cluster_bits is ${clusterBits}, not ${MIN_CLUSTER_BITS} to ${MAX_CLUSTER_BITS}`);
  }
  if (cryptMethod !== 0) throw new UnsupportedImageError(object, "is encrypted");
  const clusterSize = 2 ** clusterBits;
  if (features.headerLength > clusterSize) throw new RangeError("header_length exceeds the first cluster");
  if (backingFileOffset !== 0 && backingFileSize > 0) {
    if (backingFileSize > MAX_BACKING_NAME_BYTES || backingFileOffset + backingFileSize > clusterSize) {
      throw new RangeError("the backing file name exceeds the first cluster or 1023 bytes");
    }
    if (backingFileOffset < features.headerLength) {
      throw new RangeError("the backing file name lies inside the header");
    }
  }
  return {
    version,
    backingFileOffset,
    backingFileSize,
    clusterBits,
    size,
    l1Size,
    l1TableOffset,
    refcountTableOffset,
    refcountTableClusters,
    ...features,
  };
}

type Features = Pick<Header, "refcountOrder" | "headerLength" | "compression">;

/** "For version 2 images, the order is always assumed to be 4", the length 72 bytes, and all features absent. */
const VERSION_2_FEATURES: Features = {
  refcountOrder: 4,
  headerLength: V2_HEADER_LENGTH,
  compression: "zlib",
};

/** Fields from byte 72 on. compatible_features and autoclear_features do not concern a reader. */
function decodeFeatures(reader: ByteReader, object: string): Features {
  const incompatible = reader.u64();
  requireKnownFeatures(incompatible, object);
  reader.skip(16);
  const refcountOrder = reader.u32();
  const headerLength = reader.u32();
  if (headerLength < V3_MIN_HEADER_LENGTH || headerLength % 8 !== 0) {
    throw new RangeError(`header_length is ${headerLength}`);
  }
  if (refcountOrder > 6) throw new RangeError(`refcount_order is ${refcountOrder}`);
  const compressionType = headerLength > V3_MIN_HEADER_LENGTH ? reader.u8() : 0;
  const isBitSet = (incompatible & QCOW2_INCOMPAT_COMPRESSION) !== 0n;
  if (isBitSet !== (compressionType !== 0)) {
    throw new RangeError(`compression_type is ${compressionType}, which its feature bit contradicts`);
  }
  const compression = COMPRESSION_TYPES[compressionType];
  if (compression === undefined) {
    throw new UnsupportedImageError(object, `uses compression type ${compressionType}`);
  }
  return { refcountOrder, headerLength, compression };
}

/** incompatible_features: "An implementation must fail to open an image if an unknown bit is set." */
function requireKnownFeatures(incompatible: bigint, object: string): void {
  const refusals: readonly (readonly [bigint, string, string?])[] = [
    [QCOW2_INCOMPAT_DATA_FILE, "keeps its data in an external data file"],
    [QCOW2_INCOMPAT_EXTL2, "uses extended L2 entries"],
    [QCOW2_INCOMPAT_CORRUPT, "is marked corrupt", "Repair it with qemu-img check -r all"],
    [QCOW2_INCOMPAT_DIRTY, "is marked dirty", "Repair it with qemu-img check -r all"],
  ];
  let unknown = incompatible & ~QCOW2_INCOMPAT_COMPRESSION;
  for (const [bit, what, hint] of refusals) {
    if ((incompatible & bit) !== 0n) throw new UnsupportedImageError(object, what, { hint });
    unknown &= ~bit;
  }
  if (unknown !== 0n) {
    throw new UnsupportedImageError(object, `uses unknown incompatible features (0x${unknown.toString(16)})`);
  }
}
