import { ByteReader, ByteWriter } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";

/** The context that every server should have: what is allocated and what reads as zeroes. */
export const BASE_ALLOCATION = "base:allocation";
/** base:allocation, bit 0: not allocated. */
export const NBD_STATE_HOLE = 1 << 0;
/** base:allocation, bit 1: reads as zeroes. The only bit that says something about content. */
export const NBD_STATE_ZERO = 1 << 1;
/** qemu:dirty-bitmap, bit 0: changed since the bitmap began to record. */
export const NBD_STATE_DIRTY = 1 << 0;

/**
 * QEMU's context that tells which image of a backing chain holds a run: its flags are a number, 1 for the image that
 * is exported, 2 for its backing file and so on; 0 for what no image holds.
 */
export const QEMU_ALLOCATION_DEPTH = "qemu:allocation-depth";

/** QEMU's limit on the name of a bitmap, in bytes. */
const MAX_BITMAP_NAME = 1023;

/**
 * The metadata context of a dirty bitmap that QEMU exports: `qemu:dirty-bitmap:NAME`.
 *
 * @throws {UsageError} when `bitmap` cannot be a bitmap's name; an empty one would select all bitmaps
 */
export function dirtyBitmapContext(bitmap: string): string {
  const length = Buffer.byteLength(bitmap);
  if (length === 0 || length > MAX_BITMAP_NAME) {
    throw new UsageError(`Name of a dirty bitmap has ${length} bytes, 1 to ${MAX_BITMAP_NAME} are allowed`);
  }
  return `qemu:dirty-bitmap:${bitmap}`;
}

/**
 * Data of NBD_OPT_SET_META_CONTEXT.
 *
 *     C: 32 bits, length of export name
 *     C: String, name of export
 *     C: 32 bits, number of queries
 *     C: each query: 32 bits, length; String, query
 */
export function encodeSetMetaContext(exportName: string, queries: readonly string[]): Buffer {
  const name = Buffer.from(exportName, "utf8");
  const texts = queries.map((query) => Buffer.from(query, "utf8"));
  const size = texts.reduce((sum, text) => sum + 4 + text.length, 4 + name.length + 4);
  const writer = new ByteWriter(size).u32(name.length).bytes(name).u32(texts.length);
  for (const text of texts) writer.u32(text.length).bytes(text);
  return writer.finish();
}

/** One context that the server selected. */
export interface MetaContext {
  /** Names the context in block status replies of this connection. */
  readonly id: number;
  readonly name: string;
}

/**
 * Data of NBD_REP_META_CONTEXT.
 *
 *     S: 32 bits, NBD metadata context ID
 *     S: String, name of the metadata context
 *
 * @throws {RangeError} when it is shorter
 */
export function decodeMetaContext(payload: Buffer): MetaContext {
  const reader = new ByteReader(payload);
  return { id: reader.u32(), name: reader.text(reader.remaining) };
}
