import { ByteReader, ByteWriter, roundUp } from "../bytes/index.js";
import { QCOW2_EXT_END } from "./layout.js";

/** One header extension. */
export interface HeaderExtension {
  /** 32 bits; see layout.ts for those we know. */
  readonly type: number;
  readonly data: Buffer;
}

/** Type and length, before an extension's data. */
const EXTENSION_HEAD = 8;

/**
 * Encodes a header extension area, end marker included (specification, "Header extensions"):
 *
 *     0 - 3   type
 *     4 - 7   length of the data
 *     8 - n   data
 *     n - m   "Padding to round up the header extension size to the next multiple of 8."
 */
export function encodeExtensions(extensions: readonly HeaderExtension[]): Buffer {
  const parts = extensions.map(({ type, data }) =>
    new ByteWriter(EXTENSION_HEAD + roundUp(data.length, 8))
      .u32(type)
      .u32(data.length)
      .bytes(data)
      .skip(roundUp(data.length, 8) - data.length)
      .finish(),
  );
  return Buffer.concat([...parts, new ByteWriter(EXTENSION_HEAD).u32(QCOW2_EXT_END).u32(0).finish()]);
}

/**
 * Decodes a header extension area: ends at the end marker, or where the area ends.
 *
 * @param area from the end of the header to the backing file name or the end of the first cluster
 * @throws {RangeError} when an extension reaches beyond the area
 */
export function decodeExtensions(area: Buffer): HeaderExtension[] {
  const reader = new ByteReader(area);
  const extensions: HeaderExtension[] = [];
  while (reader.remaining >= EXTENSION_HEAD) {
    const type = reader.u32();
    const length = reader.u32();
    if (type === QCOW2_EXT_END) break;
    if (length > reader.remaining) {
      throw new RangeError(
        `header extension 0x${type.toString(16)} has ${length} bytes, ${reader.remaining} are left`,
      );
    }
    extensions.push({ type, data: reader.bytes(length) });
    reader.skip(Math.min(roundUp(length, 8) - length, reader.remaining));
  }
  return extensions;
}
