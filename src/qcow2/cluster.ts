/**
 * Clusters to stored bytes and back. Both sides are synchronous and own a native context, so that each worker
 * thread has one of each.
 */
import { inflateRawSync, constants as zlib } from "node:zlib";
import zstd from "zstd-napi/binding.js";
import { messageOf } from "../errors/index.js";
import { ClusterDamageError } from "./errors.js";
import type { Compression } from "./layout.js";

/** First bytes of a zstd frame (RFC 8878, 3.1.1: Magic_Number 0xFD2FB528, little-endian). */
const ZSTD_MAGIC = 0xfd2fb528;

/** RFC 8878, 3.1.1.1.1: bit 2 of the Frame_Header_Descriptor is the Content_Checksum_flag. */
const CONTENT_CHECKSUM_FLAG = 0b100;

/** Least bytes of a frame with a checksum: magic, descriptor, content size, one block's header, checksum. */
export const MIN_FRAME_BYTES = 13;

/** How the data clusters of one image are stored; can be sent to a worker thread. */
export interface ClusterFormat {
  readonly clusterSize: number;
  readonly compression: Compression;
  /** Whether every frame must carry a content checksum, as all frames that tidemark writes do. */
  readonly requireChecksum: boolean;
}

/** Where stored bytes come from, for messages. */
export interface ClusterOrigin {
  /** The image, as the operator knows it. */
  readonly object: string;
  /** Host offset in bytes. */
  readonly at: number;
}

/** Whether `bytes` begins like a zstd frame with a content checksum. */
export function isChecksummedFrame(bytes: Uint8Array, at = 0): boolean {
  if (bytes.length - at < MIN_FRAME_BYTES) return false;
  const view = new DataView(bytes.buffer, bytes.byteOffset + at, 5);
  return view.getUint32(0, true) === ZSTD_MAGIC && (view.getUint8(4) & CONTENT_CHECKSUM_FLAG) !== 0;
}

/** Most bytes that the frame of a cluster can have; `FrameEncoder` wants that much room. */
export function frameBound(clusterSize: number): number {
  return zstd.compressBound(clusterSize);
}

/**
 * Bytes of the frame that `stored` begins with; an L2 entry knows them in sectors only.
 *
 * @throws {ClusterDamageError} when it begins with no whole frame that has a content checksum
 */
export function frameLength(stored: Uint8Array, origin: ClusterOrigin): number {
  if (!isChecksummedFrame(stored)) {
    throw new ClusterDamageError(origin.object, origin.at, "it is no zstd frame with a content checksum");
  }
  try {
    return zstd.findFrameCompressedSize(stored);
  } catch (error) {
    throw new ClusterDamageError(origin.object, origin.at, messageOf(error), { cause: error });
  }
}

/** Encodes clusters: each becomes one zstd frame with the content checksum on, incompressible ones too. */
export class FrameEncoder {
  readonly #context = new zstd.CCtx();

  /** @param level zstd's compression level, 1 to 19 */
  constructor(level: number) {
    this.#context.setParameter(zstd.CParameter.compressionLevel, level);
    this.#context.setParameter(zstd.CParameter.checksumFlag, 1);
  }

  /**
   * Encodes a cluster into `into` at `at`, where `frameBound(cluster.length)` bytes must be free.
   *
   * @returns length of the frame in bytes
   */
  encode(cluster: Uint8Array, into: Uint8Array, at: number): number {
    return this.#context.compress2(into.subarray(at), cluster);
  }
}

/** Decodes the stored bytes of data clusters of one format. */
export class ClusterDecoder {
  readonly #format: ClusterFormat;
  readonly #context = new zstd.DCtx();

  constructor(format: ClusterFormat) {
    this.#format = format;
  }

  /**
   * Decodes one compressed cluster.
   *
   * @param stored begins with the cluster's compressed data; what follows it is ignored, since an L2 entry
   *   knows its length in sectors only
   * @param into exactly one cluster long; undefined content when this throws
   * @throws {ClusterDamageError} when the data does not decode to exactly one cluster
   */
  decode(stored: Uint8Array, into: Uint8Array, origin: ClusterOrigin): void {
    const { clusterSize, compression, requireChecksum } = this.#format;
    if (into.length !== clusterSize) throw new RangeError(`${into.length} bytes are not one cluster`);
    if (requireChecksum && !isChecksummedFrame(stored)) {
      throw new ClusterDamageError(origin.object, origin.at, "it is no zstd frame with a content checksum");
    }
    let produced: number;
    try {
      produced = compression === "zstd" ? this.#decodeZstd(stored, into) : decodeZlib(stored, into);
    } catch (error) {
      throw new ClusterDamageError(origin.object, origin.at, messageOf(error), { cause: error });
    }
    if (produced !== clusterSize) {
      throw new ClusterDamageError(
        origin.object,
        origin.at,
        `it decodes to ${produced} bytes, a cluster has ${clusterSize}`,
      );
    }
  }

  /** QEMU accepts a cluster made of several frames, so they are decoded until the cluster is full. */
  #decodeZstd(stored: Uint8Array, into: Uint8Array): number {
    let consumed = 0;
    let produced = 0;
    while (produced < into.length && consumed < stored.length) {
      const rest = stored.subarray(consumed);
      const length = zstd.findFrameCompressedSize(rest);
      produced += this.#context.decompress(into.subarray(produced), rest.subarray(0, length));
      consumed += length;
    }
    return produced;
  }
}

/**
 * QEMU's zlib clusters are raw deflate streams with a window of 12 bits. The flush mode lets a stream pass that
 * has produced the cluster but lacks its end: "decompression stops when it has produced a cluster of data".
 */
function decodeZlib(stored: Uint8Array, into: Uint8Array): number {
  const decoded = inflateRawSync(stored, {
    windowBits: 12,
    finishFlush: zlib.Z_SYNC_FLUSH,
    maxOutputLength: into.length,
  });
  into.set(decoded);
  return decoded.length;
}
