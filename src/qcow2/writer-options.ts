import { UsageError } from "../errors/index.js";
import type { ImageIdentity } from "./identity.js";
import {
  ENTRY_BYTES,
  l1EntriesFor,
  MAX_BACKING_NAME_BYTES,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MIN_WRITTEN_CLUSTER,
  SECTOR,
} from "./layout.js";

/** What an image is to be. */
export interface ImageWriterOptions {
  /** Bytes of the disk: a multiple of 512, 0 too. */
  readonly virtualSize: number;
  /** Bytes of a cluster: a power of two from 4 KiB to 2 MiB. The sink's head has as many. */
  readonly clusterSize: number;
  /** The parent's image, named as qcow2 resolves it: relative to the image's own directory. */
  readonly backing?: { readonly file: string; readonly format: "qcow2" } | undefined;
  readonly identity: ImageIdentity;
  /** Bytes of a segment, about; default 8 MiB. */
  readonly segmentBytes?: number | undefined;
}

/**
 * Returns the options if qcow2 and QEMU can have such an image.
 *
 * @throws {UsageError} when they cannot
 */
export function requireWritable(options: ImageWriterOptions): ImageWriterOptions {
  const { virtualSize, clusterSize, backing, segmentBytes } = options;
  const refuse = (why: string): never => {
    throw new UsageError(`Cannot write image of ${virtualSize} bytes: ${why}`);
  };
  if (!Number.isSafeInteger(virtualSize) || virtualSize < 0 || virtualSize % SECTOR !== 0) {
    refuse(`its size is not a multiple of ${SECTOR} bytes`);
  }
  const isPowerOfTwo = Number.isInteger(Math.log2(clusterSize));
  if (!isPowerOfTwo || clusterSize < MIN_WRITTEN_CLUSTER || clusterSize > 2 ** MAX_CLUSTER_BITS) {
    refuse(`cluster size ${clusterSize} is not a power of two from 4 KiB to 2 MiB`);
  }
  if (l1EntriesFor(virtualSize, clusterSize) * ENTRY_BYTES > MAX_L1_BYTES) {
    refuse(`with clusters of ${clusterSize} bytes its L1 table would exceed ${MAX_L1_BYTES} bytes`);
  }
  if (backing !== undefined) {
    const length = Buffer.byteLength(backing.file);
    if (length === 0 || length > MAX_BACKING_NAME_BYTES) {
      refuse(`the backing file's name has ${length} bytes, not 1 to ${MAX_BACKING_NAME_BYTES}`);
    }
  }
  if (segmentBytes !== undefined && !(segmentBytes > 0)) refuse(`segments of ${segmentBytes} bytes`);
  return options;
}
