import { ByteReader } from "../bytes/index.js";
import { isStatusLength, MAX_STATUS_PAYLOAD } from "./block-status.js";
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_READ,
  NBD_EXTENDED_REPLY_MAGIC,
  NBD_MAX_STRING,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
  NBD_REPLY_TYPE_ERROR_OFFSET,
  NBD_REPLY_TYPE_FLAG_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
} from "./constants.js";
import type { Fault } from "./errors.js";
import {
  CHUNK_HEADER_SIZE,
  decodeChunkHeader,
  decodeExtendedChunkHeader,
  decodeSimpleReply,
  EXTENDED_HEADER_SIZE,
  SIMPLE_REPLY_SIZE,
  type ChunkHeader,
} from "./frames.js";
import type { Request } from "./request.js";

/** The parser's view of the connection. */
export interface ReplyContext {
  readonly structuredReplies: boolean;
  /** All heads have 32 bytes; there are no simple replies. */
  readonly extendedHeaders: boolean;
  /** Throws a protocol error that belongs to no request. */
  readonly fault: Fault;
  /**
   * The request that a handle names; "skip" for a chunk to be dropped unread (the handle's request is over,
   * but the server is known to send more). Throws when the handle was never used, or its request is over.
   */
  find(cookie: bigint): Request | "skip";
  /** The reply to `cookie` is complete: forget it, then tell the request. */
  complete(cookie: bigint): void;
}

/** Error payload: 32 bits error, 16 bits message length, message, at most 64 bits offset; room for extensions. */
const MAX_ERROR_PAYLOAD = NBD_MAX_STRING + 64;

/** What bytes are awaited: a message's head, a payload to be looked at as a whole, content, or bytes to drop. */
type Stage =
  | { readonly kind: "head" }
  | { readonly kind: "payload"; readonly take: (payload: Buffer) => void }
  | { readonly kind: "content"; readonly target: Buffer; readonly then: () => void }
  | { readonly kind: "skip" };

const HEAD: Stage = { kind: "head" };
const SKIP: Stage = { kind: "skip" };

/**
 * Takes the server's bytes of the transmission phase as they come and hands each reply's parts to its request.
 * Content goes straight from the read buffer to its target; only heads and small payloads that are split
 * between two reads are put together in a buffer of the parser's own. Every length is judged before anything
 * is sized by it.
 */
export class ReplyParser {
  readonly #context: ReplyContext;
  readonly #head = Buffer.alloc(EXTENDED_HEADER_SIZE);
  #payload: Buffer = Buffer.alloc(0);
  #stage: Stage = HEAD;
  /** Bytes of the stage that have come, and that it needs. */
  #have = 0;
  #need = 4;

  constructor(context: ReplyContext) {
    this.#context = context;
  }

  /** Where the stream stands, for the message when it ends: undefined between two replies. */
  get inside():
    { readonly part: "header" | "payload"; readonly have: number; readonly need: number } | undefined {
    if (this.#stage.kind !== "head") return { part: "payload", have: this.#have, need: this.#need };
    if (this.#have === 0) return undefined;
    const { structuredReplies, extendedHeaders } = this.#context;
    const structured = structuredReplies ? CHUNK_HEADER_SIZE : SIMPLE_REPLY_SIZE;
    const full = extendedHeaders ? EXTENDED_HEADER_SIZE : structured;
    return { part: "header", have: this.#have, need: Math.max(this.#need, this.#need === 4 ? full : 0) };
  }

  /** @throws {NbdProtocolError} whatever is wrong; the parser is of no use afterwards */
  push(chunk: Buffer): void {
    for (let at = 0; at < chunk.length;) {
      const count = Math.min(this.#need - this.#have, chunk.length - at);
      const piece = chunk.subarray(at, at + count);
      at += count;
      this.#accept(piece);
    }
  }

  #accept(piece: Buffer): void {
    const stage = this.#stage;
    const start = this.#have;
    this.#have += piece.length;
    const complete = this.#have === this.#need;
    switch (stage.kind) {
      case "head":
        piece.copy(this.#head, start);
        if (complete) this.#takeHead();
        return;
      case "payload":
        if (complete && start === 0) stage.take(piece);
        else {
          if (start === 0) this.#payload = Buffer.allocUnsafe(this.#need);
          piece.copy(this.#payload, start);
          if (complete) stage.take(this.#payload);
        }
        return;
      case "content":
        piece.copy(stage.target, start);
        if (complete) stage.then();
        return;
      case "skip":
        if (complete) this.#next();
    }
  }

  /** The first four bytes tell which head it is. */
  #takeHead(): void {
    const magic = this.#head.readUInt32BE(0);
    if (this.#have === 4) this.#need = this.#headSize(magic);
    else if (magic === NBD_SIMPLE_REPLY_MAGIC) this.#takeSimpleReply();
    else if (magic === NBD_EXTENDED_REPLY_MAGIC) this.#takeChunk(decodeExtendedChunkHeader(this.#head));
    else this.#takeChunk(decodeChunkHeader(this.#head));
  }

  #headSize(magic: number): number {
    const { structuredReplies, extendedHeaders, fault } = this.#context;
    if (extendedHeaders) {
      if (magic === NBD_EXTENDED_REPLY_MAGIC) return EXTENDED_HEADER_SIZE;
    } else if (magic === NBD_SIMPLE_REPLY_MAGIC) return SIMPLE_REPLY_SIZE;
    else if (magic === NBD_STRUCTURED_REPLY_MAGIC && structuredReplies) return CHUNK_HEADER_SIZE;
    return fault("TM_NBD_REPLY_MAGIC", `a reply begins with 0x${magic.toString(16).padStart(8, "0")}`);
  }

  #takeSimpleReply(): void {
    const { error, cookie } = decodeSimpleReply(this.#head.subarray(0, SIMPLE_REPLY_SIZE));
    const request = this.#context.find(cookie);
    if (request === "skip") {
      this.#next();
      return;
    }
    // "MUST NOT use a simple reply for NBD_CMD_READ", "MUST use a structured reply for any ... payload"
    const needsPayload = error === 0 && request.type === NBD_CMD_BLOCK_STATUS;
    if (this.#context.structuredReplies && (needsPayload || request.type === NBD_CMD_READ)) {
      request.fault("TM_NBD_REPLY_TYPE", "server sent a simple reply in place of a structured one");
    }
    if (error === 0 && request.type === NBD_CMD_READ) {
      const target = request.content(request.offset, request.length);
      this.#expectContent(target, () => this.#finish(cookie));
      return;
    }
    if (error !== 0) request.failed(error, "");
    this.#finish(cookie);
  }

  #takeChunk(header: ChunkHeader): void {
    const { type, cookie, length } = header;
    const request = this.#context.find(cookie);
    if (request === "skip") this.#skip(header);
    else if (header.offset !== undefined && header.offset !== BigInt(request.offset)) {
      const text = `server replied to a request at ${header.offset.toString()}, it is at ${request.offset}`;
      request.fault("TM_NBD_REPLY_OFFSET", text);
    } else if ((type & NBD_REPLY_TYPE_FLAG_ERROR) !== 0) this.#takeError(request, header);
    else if (type === NBD_REPLY_TYPE_OFFSET_DATA) this.#takeData(request, header);
    else if (type === NBD_REPLY_TYPE_OFFSET_HOLE) this.#takeHole(request, header);
    else if (type === this.#statusType) this.#takeStatus(request, header);
    else if (type !== NBD_REPLY_TYPE_NONE) {
      request.fault("TM_NBD_REPLY_TYPE", `server sent a chunk of unknown type ${type}`);
    } else {
      if (length !== 0) request.fault("TM_NBD_REPLY_LENGTH", `empty chunk announces ${length} bytes`);
      if ((header.flags & NBD_REPLY_FLAG_DONE) === 0) {
        request.fault("TM_NBD_REPLY_TYPE", "server sent an empty chunk that is not the last one");
      }
      this.#finish(cookie);
    }
  }

  get #statusType(): number {
    return this.#context.extendedHeaders ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS;
  }

  /** What is dropped is block status, or an error. */
  #skip({ length }: ChunkHeader): void {
    if (length > MAX_STATUS_PAYLOAD) {
      this.#context.fault("TM_NBD_REPLY_LENGTH", `a chunk that nobody waits for announces ${length} bytes`);
    }
    this.#expect(length, SKIP);
  }

  /** NBD_REPLY_TYPE_OFFSET_DATA: 64 bits, offset; length - 8 bytes, data. */
  #takeData(request: Request, header: ChunkHeader): void {
    const length = header.length - 8;
    if (length < 1 || length > request.length) {
      const text = `chunk announces ${length} bytes of content, the request has ${request.length}`;
      request.fault("TM_NBD_REPLY_LENGTH", text);
    }
    this.#expectPayload(8, (payload) => {
      const target = request.content(offsetIn(payload, request), length);
      this.#expectContent(target, () => this.#afterChunk(header));
    });
  }

  /** NBD_REPLY_TYPE_OFFSET_HOLE: 64 bits, offset; 32 bits, hole size (unsigned, MUST be nonzero). */
  #takeHole(request: Request, header: ChunkHeader): void {
    if (header.length !== 12) {
      request.fault("TM_NBD_REPLY_LENGTH", `hole chunk has ${header.length} bytes, it must have 12`);
    }
    this.#expectPayload(12, (payload) => {
      const length = payload.readUInt32BE(8);
      if (length === 0) request.fault("TM_NBD_EMPTY_EXTENT", "server sent a hole without length");
      request.content(offsetIn(payload, request), length).fill(0);
      this.#afterChunk(header);
    });
  }

  #takeStatus(request: Request, header: ChunkHeader): void {
    const { extendedHeaders } = this.#context;
    if (!isStatusLength(header.length, extendedHeaders)) {
      request.fault("TM_NBD_STATUS_LENGTH", `block status chunk has ${header.length} bytes`);
    }
    this.#expectPayload(header.length, (payload) => {
      request.status(payload.readUInt32BE(0), payload, extendedHeaders);
      this.#afterChunk(header);
    });
  }

  /**
   * NBD_REPLY_TYPE_ERROR, _ERROR_OFFSET, and error types to come: 32 bits, error (MUST be nonzero); 16 bits,
   * message length; message; [64 bits, offset]. It ends its own request only.
   */
  #takeError(request: Request, header: ChunkHeader): void {
    const { type, length } = header;
    const least = type === NBD_REPLY_TYPE_ERROR_OFFSET ? 14 : 6;
    if (length < least || length > MAX_ERROR_PAYLOAD) {
      const text = `error chunk has ${length} bytes, ${least} to ${MAX_ERROR_PAYLOAD} are allowed`;
      request.fault("TM_NBD_ERROR_MESSAGE", text);
    }
    this.#expectPayload(length, (payload) => {
      const reader = new ByteReader(payload);
      const error = reader.u32();
      const messageLength = reader.u16();
      if (error === 0) request.fault("TM_NBD_ERROR_VALUE", "server sent an error chunk with error 0");
      if (messageLength > length - least) {
        const text = `error chunk of ${length} bytes announces a message of ${messageLength}`;
        request.fault("TM_NBD_ERROR_MESSAGE", text);
      }
      const text = reader.text(messageLength);
      if (type === NBD_REPLY_TYPE_ERROR_OFFSET) {
        const offset = reader.u64();
        if (offset < BigInt(request.offset) || offset >= BigInt(request.offset + request.length)) {
          request.fault("TM_NBD_REPLY_OFFSET", `server reports an error at ${offset.toString()}`);
        }
      }
      request.failed(error, text);
      this.#afterChunk(header);
    });
  }

  #expectPayload(length: number, take: (payload: Buffer) => void): void {
    this.#expect(length, { kind: "payload", take });
  }

  #expectContent(target: Buffer, then: () => void): void {
    this.#expect(target.length, { kind: "content", target, then });
  }

  #expect(need: number, stage: Stage): void {
    if (need === 0) {
      this.#next();
      return;
    }
    this.#stage = stage;
    this.#have = 0;
    this.#need = need;
  }

  #afterChunk(header: ChunkHeader): void {
    if ((header.flags & NBD_REPLY_FLAG_DONE) === 0) this.#next();
    else this.#finish(header.cookie);
  }

  #finish(cookie: bigint): void {
    this.#next();
    this.#context.complete(cookie);
  }

  #next(): void {
    this.#stage = HEAD;
    this.#have = 0;
    this.#need = 4;
  }
}

/** 64 bits, offset: converted once; what no number can hold lies outside any request. */
function offsetIn(payload: Buffer, request: Request): number {
  const offset = payload.readBigUInt64BE(0);
  if (offset <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(offset);
  return request.fault("TM_NBD_REPLY_OFFSET", `server sent content at ${offset.toString()}`);
}
