import { isDeepStrictEqual } from "node:util";
import { ByteReader, ByteWriter, type ByteSource, type IoOptions } from "../bytes/index.js";
import { messageOf } from "../errors/index.js";
import { ImageDamageError, ImageWriteError } from "./errors.js";
import { decodeExtensions, encodeExtensions, type HeaderExtension } from "./extension.js";
import { decodeHeader, encodeHeader, HEADER_LENGTH, type Header } from "./header.js";
import { decodeIdentity, encodeIdentity, type ImageIdentity } from "./identity.js";
import { QCOW2_EXT_BACKING_FORMAT, QCOW2_EXT_TIDEMARK } from "./layout.js";

/** What the first cluster of an image holds: header, header extensions, backing file name. */
export interface ImageHead {
  readonly header: Header;
  readonly backingFile: string | undefined;
  readonly backingFormat: string | undefined;
  /** Only images that tidemark wrote have one. */
  readonly identity: ImageIdentity | undefined;
}

/** Parameters of the head of an image that we write; the rest of its header follows from them. */
export interface HeadFields {
  readonly header: Omit<Header, "version" | "backingFileOffset" | "backingFileSize" | "headerLength">;
  readonly backingFile: string | undefined;
  readonly backingFormat: string | undefined;
  /** undefined: the image is no part of a repository. */
  readonly identity: ImageIdentity | undefined;
}

/**
 * Encodes the first cluster, and decodes it again to compare. "If the image has a backing file then the backing file name should be stored in the
 * remaining space between the end of the header extension area and the end of the first cluster."
 *
 * @throws {ImageWriteError} when it does not fit in one cluster, or does not decode to what was encoded
 */
export function encodeHead(fields: HeadFields): Buffer {
  const extensions: HeaderExtension[] = [];
  if (fields.backingFormat !== undefined) {
    extensions.push({ type: QCOW2_EXT_BACKING_FORMAT, data: Buffer.from(fields.backingFormat) });
  }
  if (fields.identity !== undefined) {
    extensions.push({ type: QCOW2_EXT_TIDEMARK, data: encodeIdentity(fields.identity) });
  }
  const area = encodeExtensions(extensions);
  const name = Buffer.from(fields.backingFile ?? "");
  const header: Header = {
    ...fields.header,
    version: 3,
    headerLength: HEADER_LENGTH,
    backingFileOffset: name.length === 0 ? 0 : HEADER_LENGTH + area.length,
    backingFileSize: name.length,
  };
  const content = Buffer.concat([encodeHeader(header), area, name]);
  const clusterSize = 2 ** header.clusterBits;
  if (content.length > clusterSize) {
    throw new ImageWriteError(`its header of ${content.length} bytes exceeds a cluster of ${clusterSize}`);
  }
  const cluster = new ByteWriter(clusterSize)
    .bytes(content)
    .skip(clusterSize - content.length)
    .finish();
  if (!isDeepStrictEqual(decodeHead(cluster, "in writing"), { ...fields, header })) {
    throw new ImageWriteError("its header does not decode to what was encoded");
  }
  return cluster;
}

/**
 * Decodes the first cluster, or as much of it as the file has.
 *
 * @param object name of the image, for messages
 * @throws {ImageDamageError | UnsupportedImageError} see decodeHeader
 */
export function decodeHead(cluster: Buffer, object: string): ImageHead {
  const header = decodeHeader(cluster, object);
  const { backingFileOffset, backingFileSize, headerLength } = header;
  const hasBacking = backingFileOffset !== 0 && backingFileSize > 0;
  try {
    const end = hasBacking ? backingFileOffset : cluster.length;
    const extensions = decodeExtensions(cluster.subarray(headerLength, end));
    const dataOf = (type: number): Buffer | undefined =>
      extensions.find((extension) => extension.type === type)?.data;
    const identity = dataOf(QCOW2_EXT_TIDEMARK);
    return {
      header,
      backingFile: hasBacking
        ? new ByteReader(cluster).skip(backingFileOffset).text(backingFileSize)
        : undefined,
      backingFormat: dataOf(QCOW2_EXT_BACKING_FORMAT)?.toString("utf8"),
      identity: identity === undefined ? undefined : decodeIdentity(identity),
    };
  } catch (error) {
    throw new ImageDamageError(object, `its header is damaged: ${messageOf(error)}`, { cause: error });
  }
}

/** Reads and decodes the first cluster of an image. */
export async function readHead(
  source: ByteSource,
  object: string,
  options: IoOptions = {},
): Promise<ImageHead> {
  const start = await source.read(0, Math.min(source.length, HEADER_LENGTH), options);
  const { clusterBits } = decodeHeader(start, object);
  const cluster = await source.read(0, Math.min(source.length, 2 ** clusterBits), options);
  return decodeHead(cluster, object);
}
