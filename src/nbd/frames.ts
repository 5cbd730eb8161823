import { ByteReader, ByteWriter } from "../bytes/index.js";
import { NBD_EXTENDED_REQUEST_MAGIC, NBD_OPTION_MAGIC, NBD_REQUEST_MAGIC } from "./constants.js";

/**
 * The fixed-size frames of both phases. Decoders read a buffer of exactly the frame's size and judge
 * nothing: magics, types and lengths are checked where it is known what they mean.
 */

/** What a server says first. Section "Newstyle negotiation". */
export interface Greeting {
  readonly initMagic: bigint;
  readonly optionMagic: bigint;
  /** NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES */
  readonly handshakeFlags: number;
}

export const GREETING_SIZE = 18;

/**
 *     S: 64 bits, NBDMAGIC
 *     S: 64 bits, IHAVEOPT
 *     S: 16 bits, handshake flags
 */
export function decodeGreeting(buffer: Buffer): Greeting {
  const reader = new ByteReader(buffer);
  return { initMagic: reader.u64(), optionMagic: reader.u64(), handshakeFlags: reader.u16() };
}

/** C: 32 bits, client flags */
export function encodeClientFlags(flags: number): Buffer {
  return new ByteWriter(4).u32(flags).finish();
}

/**
 *     C: 64 bits, IHAVEOPT
 *     C: 32 bits, option
 *     C: 32 bits, length of option data
 *     C: any data needed for the chosen option
 */
export function encodeOption(option: number, data: Buffer): Buffer {
  return new ByteWriter(16 + data.length)
    .u64(NBD_OPTION_MAGIC)
    .u32(option)
    .u32(data.length)
    .bytes(data)
    .finish();
}

/** Head of an option reply. Section "Fixed newstyle negotiation". */
export interface OptionReplyHeader {
  readonly magic: bigint;
  readonly option: number;
  readonly type: number;
  readonly length: number;
}

export const OPTION_REPLY_HEADER_SIZE = 20;

/**
 *     S: 64 bits, 0x3e889045565a9
 *     S: 32 bits, the option as sent by the client to which this is a reply
 *     S: 32 bits, reply type
 *     S: 32 bits, length of the reply
 */
export function decodeOptionReplyHeader(buffer: Buffer): OptionReplyHeader {
  const reader = new ByteReader(buffer);
  return { magic: reader.u64(), option: reader.u32(), type: reader.u32(), length: reader.u32() };
}

/** Data of NBD_OPT_GO and NBD_OPT_INFO: 32 bits name length, name, 16 bits count, 16 bits each. */
export function encodeGoData(exportName: string, informationTypes: readonly number[]): Buffer {
  const name = Buffer.from(exportName, "utf8");
  const writer = new ByteWriter(4 + name.length + 2 + 2 * informationTypes.length)
    .u32(name.length)
    .bytes(name)
    .u16(informationTypes.length);
  for (const type of informationTypes) writer.u16(type);
  return writer.finish();
}

/** Head of a request. Section "Request message". */
export interface RequestFrame {
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  readonly offset: number;
  readonly length: number;
}

export const REQUEST_SIZE = 28;
/** Of requests and of reply chunks alike, once extended headers were negotiated. */
export const EXTENDED_HEADER_SIZE = 32;

/**
 *     C: 32 bits, 0x25609513, magic (NBD_REQUEST_MAGIC)
 *     C: 16 bits, command flags
 *     C: 16 bits, type
 *     C: 64 bits, handle
 *     C: 64 bits, offset (unsigned)
 *     C: 32 bits, length (unsigned)
 */
export function encodeRequest(request: RequestFrame): Buffer {
  return new ByteWriter(REQUEST_SIZE)
    .u32(NBD_REQUEST_MAGIC)
    .u16(request.flags)
    .u16(request.type)
    .u64(request.cookie)
    .u64(request.offset)
    .u32(request.length)
    .finish();
}

/**
 * With extended headers:
 *
 *     C: 32 bits, 0x21e41c71, magic (NBD_EXTENDED_REQUEST_MAGIC)
 *     C: 16 bits, command flags
 *     C: 16 bits, type
 *     C: 64 bits, cookie
 *     C: 64 bits, offset (unsigned)
 *     C: 64 bits, payload/effect length (unsigned)
 */
export function encodeExtendedRequest(request: RequestFrame): Buffer {
  return new ByteWriter(EXTENDED_HEADER_SIZE)
    .u32(NBD_EXTENDED_REQUEST_MAGIC)
    .u16(request.flags)
    .u16(request.type)
    .u64(request.cookie)
    .u64(request.offset)
    .u64(request.length)
    .finish();
}

/** Section "Simple reply message". */
export interface SimpleReply {
  readonly error: number;
  readonly cookie: bigint;
}

export const SIMPLE_REPLY_SIZE = 16;

/**
 *     S: 32 bits, 0x67446698, magic (NBD_SIMPLE_REPLY_MAGIC)
 *     S: 32 bits, error (MAY be zero)
 *     S: 64 bits, handle
 */
export function decodeSimpleReply(buffer: Buffer): SimpleReply {
  const reader = new ByteReader(buffer).skip(4);
  return { error: reader.u32(), cookie: reader.u64() };
}

/** Head of one chunk. Section "Structured reply chunk message". */
export interface ChunkHeader {
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  /** Bytes of payload that follow; 2^53 - 1 for all that is more. */
  readonly length: number;
  /** "MUST match the offset of the request"; with extended headers only. */
  readonly offset?: bigint;
}

export const CHUNK_HEADER_SIZE = 20;

/**
 *     S: 32 bits, 0x668e33ef, magic (NBD_STRUCTURED_REPLY_MAGIC)
 *     S: 16 bits, flags
 *     S: 16 bits, type
 *     S: 64 bits, handle
 *     S: 32 bits, length of payload (unsigned)
 */
export function decodeChunkHeader(buffer: Buffer): ChunkHeader {
  const reader = new ByteReader(buffer).skip(4);
  return { flags: reader.u16(), type: reader.u16(), cookie: reader.u64(), length: reader.u32() };
}

/**
 * Section "Extended reply chunk message".
 *
 *     S: 32 bits, 0x6e8a278c, magic (NBD_EXTENDED_REPLY_MAGIC)
 *     S: 16 bits, flags
 *     S: 16 bits, type
 *     S: 64 bits, cookie
 *     S: 64 bits, offset (unsigned)
 *     S: 64 bits, length of payload (unsigned)
 */
export function decodeExtendedChunkHeader(buffer: Buffer): ChunkHeader {
  const reader = new ByteReader(buffer).skip(4);
  const head = { flags: reader.u16(), type: reader.u16(), cookie: reader.u64(), offset: reader.u64() };
  return { ...head, length: Math.min(Number(reader.u64()), Number.MAX_SAFE_INTEGER) };
}
