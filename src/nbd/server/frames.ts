import { ByteReader, ByteWriter } from "../../bytes/index.js";
import {
  NBD_INIT_MAGIC,
  NBD_OPTION_MAGIC,
  NBD_OPTION_REPLY_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
} from "../constants.js";
import { CHUNK_HEADER_SIZE, GREETING_SIZE, SIMPLE_REPLY_SIZE, type RequestFrame } from "../frames.js";

/**
 * The server's side of the fixed-size frames: their tables stand in ../frames.ts, above the client's side. Decoders judge
 * nothing.
 */

/** @param handshakeFlags NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES */
export function encodeGreeting(handshakeFlags: number): Buffer {
  return new ByteWriter(GREETING_SIZE).u64(NBD_INIT_MAGIC).u64(NBD_OPTION_MAGIC).u16(handshakeFlags).finish();
}

export interface OptionHeader {
  readonly magic: bigint;
  readonly option: number;
  /** Bytes of data that follow. */
  readonly length: number;
}

export const OPTION_HEADER_SIZE = 16;

export function decodeOptionHeader(buffer: Buffer): OptionHeader {
  const reader = new ByteReader(buffer);
  return { magic: reader.u64(), option: reader.u32(), length: reader.u32() };
}

export function encodeOptionReply(option: number, type: number, data: Uint8Array): Buffer {
  return new ByteWriter(20 + data.length)
    .u64(NBD_OPTION_REPLY_MAGIC)
    .u32(option)
    .u32(type)
    .u32(data.length)
    .bytes(data)
    .finish();
}

/** A request as it came. */
export interface ReceivedRequest extends RequestFrame {
  readonly magic: number;
}

/** A request's head. `offset` is 2^53 - 1 for all that is more. */
export function decodeRequest(buffer: Buffer): ReceivedRequest {
  const reader = new ByteReader(buffer);
  const head = { magic: reader.u32(), flags: reader.u16(), type: reader.u16(), cookie: reader.u64() };
  const offset = Math.min(Number(reader.u64()), Number.MAX_SAFE_INTEGER);
  return { ...head, offset, length: reader.u32() };
}

export function encodeSimpleReply(cookie: bigint, error: number): Buffer {
  return new ByteWriter(SIMPLE_REPLY_SIZE).u32(NBD_SIMPLE_REPLY_MAGIC).u32(error).u64(cookie).finish();
}

/** A chunk's head, and what of its payload comes before the data. @param dataLength bytes of data that follow */
export function encodeChunk(
  { flags, type, cookie }: { readonly flags: number; readonly type: number; readonly cookie: bigint },
  payload: Uint8Array,
  dataLength = 0,
): Buffer {
  return new ByteWriter(CHUNK_HEADER_SIZE + payload.length)
    .u32(NBD_STRUCTURED_REPLY_MAGIC)
    .u16(flags)
    .u16(type)
    .u64(cookie)
    .u32(payload.length + dataLength)
    .bytes(payload)
    .finish();
}
