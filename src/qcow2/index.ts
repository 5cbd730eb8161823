/**
 * qcow2, QEMU's image format (docs/interop/qcow2.txt of QEMU).
 *
 * - image: one qcow2 file. *Full* without a backing file, *incremental* with one.
 * - cluster: the unit of a disk that an image maps. A *guest* cluster is one of the disk, a *host* cluster one of
 *   the file.
 * - frame: the stored form of one data cluster as we write it: one zstd frame with a content checksum.
 * - L2 table: maps guest clusters to host offsets; the L1 table names the L2 tables.
 * - segment: a range of an image's bytes with its digest, holding either frames, or tables, or the header cluster.
 * - mapping: what an image, or a chain of images, says about a run of the disk.
 * - identity: what an image that we wrote says about itself, in a header extension of our own.
 */
export type { FrameBatch } from "./body.js";
export { measureReads } from "./chain-reads.js";
export { ImageChain } from "./chain.js";
export {
  ClusterDecoder,
  frameBound,
  frameLength,
  FrameEncoder,
  type ClusterFormat,
  type ClusterOrigin,
} from "./cluster.js";
export { ClusterDamageError, ImageDamageError, ImageWriteError, UnsupportedImageError } from "./errors.js";
export type { ImageIdentity } from "./identity.js";
export { DEFAULT_CLUSTER_SIZE, type Compression } from "./layout.js";
export type { ChainMapping, CompressedMapping, EmptyMapping, Mapping, PlainMapping } from "./mapping.js";
export { mergeImages, type Merge, type MergeObserver, type MergeSummary } from "./merge.js";
export { measureMerge, mergedLength, type MergeMeasure } from "./merge-measure.js";
export { ImageReader, type ImageReaderOptions } from "./reader.js";
export { PlainImageWriter } from "./plain-writer.js";
export { digestOfSegments, type Segment, type SegmentKind, type WrittenBase } from "./segments.js";
export { ImageWriter, type ImageSummary } from "./writer.js";
export type { ImageWriterOptions } from "./writer-options.js";
