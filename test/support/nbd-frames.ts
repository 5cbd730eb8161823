import { readFileSync } from "node:fs";

/** One field of a frame: its width in bits and its value; or bytes as they are; or text as UTF-8. */
export type Field = readonly [bits: 8 | 16 | 32 | 64, value: number | bigint] | Uint8Array | string;

/**
 * A frame from a table of its fields, big-endian: the tests' own way of writing the protocol, so that a mistake
 * in the codecs under test is not repeated on the other side.
 */
export function frame(...fields: readonly Field[]): Buffer {
  return Buffer.concat(
    fields.map((field) => {
      if (typeof field === "string") return Buffer.from(field, "utf8");
      if (field instanceof Uint8Array) return Buffer.from(field);
      const [bits, value] = field;
      return Buffer.from(
        BigInt(value)
          .toString(16)
          .padStart(bits / 4, "0"),
        "hex",
      );
    }),
  );
}

/** "NBDMAGIC", "IHAVEOPT", fixed newstyle and no zeroes. */
export function greeting(flags = 3): Buffer {
  return frame("NBDMAGIC", "IHAVEOPT", [16, flags]);
}

/** A reply to an option. */
export function optionReply(option: number, type: number, ...data: readonly Field[]): Buffer {
  const payload = frame(...data);
  return frame([64, 0x3e889045565a9n], [32, option], [32, type], [32, payload.length], payload);
}

/** Types of option replies, by the names of the specification. */
export const REP = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERR_UNSUP: 0x80000001,
  ERR_POLICY: 0x80000002,
  ERR_TLS_REQD: 0x80000005,
  ERR_UNKNOWN: 0x80000006,
} as const;

/** Types of options. */
export const OPT = {
  ABORT: 2,
  LIST: 3,
  STARTTLS: 5,
  GO: 7,
  STRUCTURED_REPLY: 8,
  SET_META_CONTEXT: 10,
  EXTENDED_HEADERS: 11,
} as const;

/** Types of requests. */
export const CMD = { READ: 0, WRITE: 1, DISC: 2, FLUSH: 3, WRITE_ZEROES: 6, BLOCK_STATUS: 7 } as const;

/** Types of structured reply chunks. */
export const CHUNK = {
  NONE: 0,
  OFFSET_DATA: 1,
  OFFSET_HOLE: 2,
  BLOCK_STATUS: 5,
  BLOCK_STATUS_EXT: 6,
  ERROR: 0x8001,
  ERROR_OFFSET: 0x8002,
} as const;

/** A request's handle as the client wrote it. */
export type Cookie = number | bigint;

/** Head of a chunk, with its own idea of how long the payload is. */
export interface ChunkHead {
  readonly done: boolean;
  readonly type: number;
  readonly cookie: Cookie;
  readonly length?: number | bigint;
}

/** A chunk of a structured reply. */
export function chunk(head: ChunkHead, ...data: readonly Field[]): Buffer {
  const payload = frame(...data);
  const length = head.length ?? payload.length;
  return frame(
    [32, 0x668e33ef],
    [16, head.done ? 1 : 0],
    [16, head.type],
    [64, head.cookie],
    [32, length],
    payload,
  );
}

/** A chunk with an extended head, which repeats the request's offset. */
export function extendedChunk(
  head: ChunkHead & { readonly offset: number },
  ...data: readonly Field[]
): Buffer {
  const payload = frame(...data);
  const { done, type, cookie, offset, length = payload.length } = head;
  const numbers = [[64, cookie] as const, [64, offset] as const, [64, length] as const];
  return frame([32, 0x6e8a278c], [16, done ? 1 : 0], [16, type], ...numbers, payload);
}

/** A simple reply. */
export function simpleReply(cookie: Cookie, error: number, data: Uint8Array = new Uint8Array()): Buffer {
  return frame([32, 0x67446698], [32, error], [64, cookie], data);
}

/** Bytes that tell their place: the content of the test exports. */
export function contentAt(offset: number, length: number): Buffer {
  const content = Buffer.alloc(length);
  for (let index = 0; index < length; index += 1) content[index] = ((offset + index) * 167 + 13) & 0xff;
  return content;
}

/** A captured session of `fixtures/nbd`: `captured("qemu-read.server")`. */
export function captured(name: string): Buffer {
  const file = new URL(`../../fixtures/nbd/${name}.hex`, import.meta.url);
  return Buffer.from(readFileSync(file, "ascii").replaceAll("\n", ""), "hex");
}
