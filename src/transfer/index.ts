/**
 * Transfer: the worker threads through which bulk data passes, once.
 *
 * - FrameReader: exports over NBD -> zstd frames (backup)
 * - FrameDecoder: zstd frames -> raw clusters (restore)
 * - streamChain: a chain of images -> the disk, in order
 */
export { streamChain, type DiskPiece } from "./chain-stream.js";
export { FrameDecoder, type DecodeRequest } from "./frame-decoder.js";
export { FrameReader, type FrameExport, type FrameReply, type FrameRequest } from "./frame-reader.js";
