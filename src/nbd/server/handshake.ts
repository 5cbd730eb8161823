import { ByteReader, ByteWriter } from "../../bytes/index.js";
import {
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_NO_ZEROES,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_CACHE,
  NBD_FLAG_SEND_DF,
  NBD_FLAG_SEND_FLUSH,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_DESCRIPTION,
  NBD_INFO_EXPORT,
  NBD_INFO_NAME,
  NBD_MAX_STRING,
  NBD_OPT_ABORT,
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_GO,
  NBD_OPT_INFO,
  NBD_OPT_LIST,
  NBD_OPT_LIST_META_CONTEXT,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_OPTION_MAGIC,
  NBD_REP_ACK,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
  NBD_REP_SERVER,
} from "../constants.js";
import { faultOf } from "../errors.js";
import { decodeOptionHeader, encodeGreeting, encodeOptionReply, OPTION_HEADER_SIZE } from "./frames.js";
import type { Peer } from "./peer.js";
import { MAX_PAYLOAD, type Agreement, type ServedContext, type ServedExport } from "./served-export.js";

/** Largest data of an option: a name and some queries. */
const MAX_OPTION_DATA = 64 * 1024;
/** Most options of one handshake. */
const MAX_OPTIONS = 1024;
/** Most queries of one option. */
const MAX_QUERIES = 1024;

const fault = faultOf("Cannot serve NBD client");

/**
 * The server's side of the handshake: fixed newstyle, options one at a time until the client has chosen an export.
 * Sections "Newstyle negotiation" and "Option types" of the specification.
 *
 * @returns undefined when the client is content with what it has heard, and leaves
 * @throws {NbdProtocolError} when it breaks the protocol
 * @throws {PeerGone} when it leaves without a word
 */
export async function shakeHands(
  peer: Peer,
  exports: readonly ServedExport[],
): Promise<Agreement | undefined> {
  await peer.send(encodeGreeting(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES));
  const flags = (await peer.take(4)).readUInt32BE();
  if ((flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)) !== 0) {
    fault("TM_NBD_CLIENT_FLAGS", `it has flags 0x${flags.toString(16)} that are not known`);
  }
  return await new Handshake(peer, exports, (flags & NBD_FLAG_C_NO_ZEROES) !== 0).haggle();
}

/** The answer to an option. */
interface Answer {
  /** NBD_REP_…; undefined for none at all. */
  readonly reply?: number;
  /** The reason of a refusal. */
  readonly text?: string;
  /** Ends the haggling: with an agreement, or with none because the client has heard enough. */
  readonly end?: { readonly agreement: Agreement | undefined };
}

const ACK: Answer = { reply: NBD_REP_ACK };
const refuse = (reply: number, text: string): Answer => ({ reply, text });

class Handshake {
  readonly #peer: Peer;
  readonly #exports: readonly ServedExport[];
  readonly #noZeroes: boolean;
  #isStructured = false;
  /** Chosen contexts, and the export that they were chosen for. */
  #chosen:
    { readonly export: ServedExport; readonly contexts: ReadonlyMap<number, ServedContext> } | undefined;

  constructor(peer: Peer, exports: readonly ServedExport[], noZeroes: boolean) {
    this.#peer = peer;
    this.#exports = exports;
    this.#noZeroes = noZeroes;
  }

  async haggle(): Promise<Agreement | undefined> {
    for (let count = 0; count < MAX_OPTIONS; count += 1) {
      const { magic, option, length } = decodeOptionHeader(await this.#peer.take(OPTION_HEADER_SIZE));
      if (magic !== NBD_OPTION_MAGIC) fault("TM_NBD_OPTION_MAGIC", "an option begins without IHAVEOPT");
      if (length > MAX_OPTION_DATA)
        fault("TM_NBD_OPTION_LENGTH", `option ${option} has ${length} bytes of data`);
      const { reply, text = "", end } = await this.#answer(option, await this.#peer.take(length));
      if (reply !== undefined) await this.#reply(option, reply, Buffer.from(text));
      if (end !== undefined) return end.agreement;
    }
    return fault("TM_NBD_OPTIONS", `it sent ${MAX_OPTIONS} options and chose no export`);
  }

  async #answer(option: number, data: Buffer): Promise<Answer> {
    switch (option) {
      case NBD_OPT_EXPORT_NAME:
        return await this.#exportName(data.toString("utf8"));
      case NBD_OPT_ABORT:
        return { ...ACK, end: { agreement: undefined } };
      case NBD_OPT_LIST:
        return await this.#list(data);
      case NBD_OPT_INFO:
      case NBD_OPT_GO:
        return await this.#info(option, data);
      case NBD_OPT_STRUCTURED_REPLY:
        if (data.length > 0) return refuse(NBD_REP_ERR_INVALID, "no data expected");
        this.#isStructured = true;
        return ACK;
      case NBD_OPT_LIST_META_CONTEXT:
      case NBD_OPT_SET_META_CONTEXT:
        return await this.#metaContext(option, data);
      default:
        return refuse(NBD_REP_ERR_UNSUP, "not supported");
    }
  }

  /** The old way to choose: nothing can be refused but by leaving. */
  async #exportName(name: string): Promise<Answer> {
    const found = this.#find(name);
    if (found === undefined) return fault("TM_NBD_NO_EXPORT", `there is no export ${JSON.stringify(name)}`);
    const zeroes = this.#noZeroes ? 0 : 124;
    await this.#peer.send(
      new ByteWriter(10 + zeroes).u64(found.size).u16(this.#flags()).skip(zeroes).finish(),
    );
    return { end: { agreement: this.#agree(found) } };
  }

  async #list(data: Buffer): Promise<Answer> {
    if (data.length > 0) return refuse(NBD_REP_ERR_INVALID, "no data expected");
    for (const { name, description } of this.#exports) {
      const text = Buffer.from(name, "utf8");
      const reply = new ByteWriter(4 + text.length).u32(text.length).bytes(text).finish();
      const details = Buffer.from(description, "utf8");
      await this.#reply(NBD_OPT_LIST, NBD_REP_SERVER, Buffer.concat([reply, details]));
    }
    return ACK;
  }

  async #info(option: number, data: Buffer): Promise<Answer> {
    const request = decodeInfo(data);
    if (request === undefined) return refuse(NBD_REP_ERR_INVALID, "malformed");
    const found = this.#find(request.name);
    if (found === undefined) return refuse(NBD_REP_ERR_UNKNOWN, "no such export");
    const say = async (type: number, info: Buffer): Promise<void> => {
      const head = new ByteWriter(2).u16(type).finish();
      await this.#reply(option, NBD_REP_INFO, Buffer.concat([head, info]));
    };
    await say(NBD_INFO_EXPORT, new ByteWriter(10).u64(found.size).u16(this.#flags()).finish());
    if (request.types.includes(NBD_INFO_NAME)) await say(NBD_INFO_NAME, Buffer.from(found.name));
    if (request.types.includes(NBD_INFO_DESCRIPTION)) {
      await say(NBD_INFO_DESCRIPTION, Buffer.from(found.description));
    }
    if (request.types.includes(NBD_INFO_BLOCK_SIZE)) {
      const sizes = new ByteWriter(12).u32(1).u32(found.preferredBlock).u32(MAX_PAYLOAD);
      await say(NBD_INFO_BLOCK_SIZE, sizes.finish());
    }
    return option === NBD_OPT_GO ? { ...ACK, end: { agreement: this.#agree(found) } } : ACK;
  }

  async #metaContext(option: number, data: Buffer): Promise<Answer> {
    const request = decodeMetaContext(data);
    if (request === undefined) return refuse(NBD_REP_ERR_INVALID, "malformed");
    if (!this.#isStructured) {
      return refuse(NBD_REP_ERR_INVALID, "structured replies come first");
    }
    const found = this.#find(request.name);
    const isList = option === NBD_OPT_LIST_META_CONTEXT;
    if (!isList) this.#chosen = undefined;
    if (found === undefined) return refuse(NBD_REP_ERR_UNKNOWN, "no such export");
    const contexts = new Map(
      found.contexts.flatMap((context, index) =>
        isWanted(context.name, request.queries, isList) ? [[index + 1, context]] : [],
      ),
    );
    for (const [id, { name }] of contexts) {
      const text = Buffer.from(name, "utf8");
      const reply = new ByteWriter(4 + text.length)
        .u32(isList ? 0 : id)
        .bytes(text)
        .finish();
      await this.#reply(option, NBD_REP_META_CONTEXT, reply);
    }
    if (!isList) this.#chosen = { export: found, contexts };
    return ACK;
  }

  #agree(found: ServedExport): Agreement {
    // "the server MUST … disregard" contexts that were chosen for another export.
    const contexts =
      this.#chosen?.export === found ? this.#chosen.contexts : new Map<number, ServedContext>();
    return { export: found, isStructured: this.#isStructured, contexts };
  }

  /** "A special, 'empty', name … means the default export": the first. */
  #find(name: string): ServedExport | undefined {
    return name === "" ? this.#exports[0] : this.#exports.find((candidate) => candidate.name === name);
  }

  #flags(): number {
    const always =
      NBD_FLAG_HAS_FLAGS |
      NBD_FLAG_READ_ONLY |
      NBD_FLAG_SEND_FLUSH |
      NBD_FLAG_CAN_MULTI_CONN |
      NBD_FLAG_SEND_CACHE;
    return this.#isStructured ? always | NBD_FLAG_SEND_DF : always;
  }

  async #reply(option: number, type: number, data: Buffer): Promise<void> {
    await this.#peer.send(encodeOptionReply(option, type, data));
  }
}

/** 32 bits name length, name, 16 bits count, 16 bits each; undefined when it is not that. */
function decodeInfo(data: Buffer): { readonly name: string; readonly types: readonly number[] } | undefined {
  const reader = new ByteReader(data);
  const name = readString(reader);
  if (name === undefined || reader.remaining < 2) return undefined;
  const count = reader.u16();
  if (reader.remaining !== count * 2) return undefined;
  return { name, types: Array.from({ length: count }, () => reader.u16()) };
}

/** 32 bits name length, name, 32 bits count, each: 32 bits length and query; undefined when it is not that. */
function decodeMetaContext(
  data: Buffer,
): { readonly name: string; readonly queries: readonly string[] } | undefined {
  const reader = new ByteReader(data);
  const name = readString(reader);
  if (name === undefined || reader.remaining < 4) return undefined;
  const count = reader.u32();
  if (count > MAX_QUERIES) return undefined;
  const queries: string[] = [];
  for (let left = count; left > 0; left -= 1) {
    const query = readString(reader);
    if (query === undefined) return undefined;
    queries.push(query);
  }
  return reader.remaining === 0 ? { name, queries } : undefined;
}

function readString(reader: ByteReader): string | undefined {
  if (reader.remaining < 4) return undefined;
  const length = reader.u32();
  return length > NBD_MAX_STRING || length > reader.remaining ? undefined : reader.text(length);
}

/** Lists take prefixes that end in a colon, and no query at all for everything; choosing takes whole names. */
function isWanted(name: string, queries: readonly string[], isList: boolean): boolean {
  if (isList && queries.length === 0) return true;
  return queries.some((query) => query === name || (isList && query.endsWith(":") && name.startsWith(query)));
}
