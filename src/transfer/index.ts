/**
 * Transfer: the worker threads through which bulk data passes, once.
 *
 * - FrameReader: exports over NBD -> zstd frames (backup)
 * - ExportConnection, Replacement: a connection to an export, and what happens when it drops
 * - FrameDecoder: zstd frames -> raw clusters (restore)
 * - RangeReader: ranges of chains, many at a time -> raw clusters (serve)
 * - SegmentChecker: segments of images -> what is wrong with them (verify)
 * - streamChain: a chain of images -> the disk, in order, window by window: runs of it that are loaded at once
 */
export { STREAM_MEMORY, streamChain, type DiskPiece } from "./chain-stream.js";
export { ExportConnection, type ExportPlace } from "./export-connection.js";
export { FrameDecoder } from "./frame-decoder.js";
export { FrameReader, type FrameExport, type FrameReply, type FrameRequest } from "./frame-reader.js";
export { RangeReader } from "./range-reader.js";
export { SegmentChecker, type SegmentCheck } from "./segment-checker.js";
export { MOST_REPLACEMENTS, Replacement, type Replaceable, type ReplacementOptions } from "./replacement.js";
