/**
 * Bytes: units, big-endian cursors for codecs, and the two shapes in which bytes move between folders.
 *
 * - ByteSource: can be read at any offset.
 * - HeadLastSink: is written front to back, its first bytes last.
 */
export { ByteReader, ByteWriter } from "./cursor.js";
export { formatSize, parseSize } from "./size-text.js";
export { readInto, type ByteSource, type HeadLastSink, type IoOptions, type ReadOptions } from "./source.js";
export { GiB, KiB, MiB, TiB, roundDown, roundUp } from "./units.js";
export { isZero } from "./zero.js";
