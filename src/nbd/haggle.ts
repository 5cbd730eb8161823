import type { ConnectionOptions } from "node:tls";
import { ByteReader } from "../bytes/index.js";
import {
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_INIT_MAGIC,
  NBD_MAX_STRING,
  NBD_OLDSTYLE_MAGIC,
  NBD_OPT_ABORT,
  NBD_OPT_LIST,
  NBD_OPTION_MAGIC,
  NBD_OPTION_REPLY_MAGIC,
  NBD_REP_ACK,
  NBD_REP_FLAG_ERROR,
} from "./constants.js";
import { faultOf, type Fault } from "./errors.js";
import {
  decodeGreeting,
  decodeOptionReplyHeader,
  encodeClientFlags,
  encodeOption,
  GREETING_SIZE,
  OPTION_REPLY_HEADER_SIZE,
} from "./frames.js";
import { HandshakeStream } from "./handshake-stream.js";
import type { NbdSocket } from "./socket.js";

/** Largest option reply: two strings and their lengths (NBD_REP_SERVER), with room for extensions. */
const MAX_OPTION_REPLY = 4 * NBD_MAX_STRING;
/** Most replies to one option: information and contexts come by the handful. */
const MAX_OPTION_REPLIES = 256;
/** Most replies to NBD_OPT_LIST: one for each export of a very large server. */
const MAX_LISTED_EXPORTS = 65_536;

/** How a server answered an option in the end. */
export type OptionOutcome =
  | { readonly accepted: true }
  /** `type`: NBD_REP_ERR_…; `text`: the server's words, not fit to be shown as they are. */
  | { readonly accepted: false; readonly type: number; readonly text: string };

/** Takes one informative reply to an option: its type and its data. */
export type OptionReplyHandler = (type: number, reader: ByteReader) => void;

/** Option haggling on one socket: one option at a time, each with its replies. */
export class Haggle {
  readonly fault: Fault;
  readonly action: string;
  readonly #socket: NbdSocket;
  readonly #stream: HandshakeStream;
  /** Explains an end of the connection that is TLS's, until the first reply came through it. */
  #explain: ((error: Error) => Error) | undefined;

  private constructor(socket: NbdSocket, action: string) {
    this.#socket = socket;
    this.action = action;
    this.fault = faultOf(action);
    this.#stream = new HandshakeStream(action);
    socket.receive(this.#stream);
  }

  /**
   * Reads the greeting and answers it. Only fixed newstyle servers are accepted.
   *
   * @param action for messages: `Cannot negotiate export "sda" with unix:/run/vm.sock`
   */
  static async begin(socket: NbdSocket, action: string): Promise<Haggle> {
    const haggle = new Haggle(socket, action);
    const greeting = decodeGreeting(await haggle.#stream.take(GREETING_SIZE, "the greeting"));
    if (greeting.initMagic !== NBD_INIT_MAGIC) {
      haggle.fault("TM_NBD_GREETING_MAGIC", `it is not an NBD server: it begins ${hex(greeting.initMagic)}`);
    }
    if (greeting.optionMagic === NBD_OLDSTYLE_MAGIC) {
      haggle.fault("TM_NBD_OLDSTYLE", "server speaks the oldstyle protocol, fixed newstyle is needed");
    }
    if (greeting.optionMagic !== NBD_OPTION_MAGIC) {
      haggle.fault("TM_NBD_GREETING_MAGIC", `greeting has ${hex(greeting.optionMagic)} in place of IHAVEOPT`);
    }
    if ((greeting.handshakeFlags & NBD_FLAG_FIXED_NEWSTYLE) === 0) {
      haggle.fault("TM_NBD_OLDSTYLE", "server speaks the newstyle protocol, fixed newstyle is needed");
    }
    const noZeroes = (greeting.handshakeFlags & NBD_FLAG_NO_ZEROES) === 0 ? 0 : NBD_FLAG_C_NO_ZEROES;
    socket.write(encodeClientFlags(NBD_FLAG_C_FIXED_NEWSTYLE | noZeroes));
    return haggle;
  }

  /**
   * Encrypts all that follows, once the server has agreed to.
   *
   * @param explain makes an error of what TLS, or a server that says goodbye right after it, ended with
   */
  async encrypt(connection: ConnectionOptions, explain: (error: Error) => Error): Promise<void> {
    const unasked = this.#stream.rest().length;
    if (unasked > 0) {
      // Somebody on the way could have put them there, to be taken for what came through TLS.
      this.fault("TM_NBD_TLS_EARLY", `${unasked} bytes in plain text follow the server's consent to TLS`);
    }
    try {
      await this.#socket.encrypt(connection);
    } catch (error) {
      throw explain(error as Error);
    }
    this.#explain = explain;
  }

  /** Sends one option and takes its replies, each through `onReply`, until the final one. */
  async ask(
    option: number,
    data: Buffer = Buffer.alloc(0),
    onReply?: OptionReplyHandler,
  ): Promise<OptionOutcome> {
    this.#socket.write(encodeOption(option, data));
    const most = option === NBD_OPT_LIST ? MAX_LISTED_EXPORTS : MAX_OPTION_REPLIES;
    for (let count = 0; count <= most; count += 1) {
      const { type, payload } = await this.#takeReply(option);
      if (type === NBD_REP_ACK) {
        if (payload.length > 0)
          this.fault("TM_NBD_OPTION_REPLY", "acknowledgement of an option carries data");
        return { accepted: true };
      }
      if (type >= NBD_REP_FLAG_ERROR) return { accepted: false, type, text: payload.toString("utf8") };
      if (onReply === undefined) {
        this.fault("TM_NBD_OPTION_REPLY", `reply ${type} does not belong to option ${option}`);
      }
      this.#handle(onReply, type, payload);
    }
    return this.fault("TM_NBD_OPTION_COUNT", `more than ${most} replies came to option ${option}`);
  }

  /** Ends haggling in the orderly way: NBD_OPT_ABORT; the server's answer is not waited for. */
  async abort(): Promise<void> {
    this.#socket.write(encodeOption(NBD_OPT_ABORT, Buffer.alloc(0)));
    await this.#socket.finish();
    this.#socket.destroy();
  }

  /** Bytes behind the last reply: they belong to the transmission phase. */
  rest(): Buffer {
    return this.#stream.rest();
  }

  async #takeReply(option: number): Promise<{ type: number; payload: Buffer }> {
    const part = `the reply to option ${option}`;
    const header = decodeOptionReplyHeader(await this.#takeFirst(part));
    if (header.magic !== NBD_OPTION_REPLY_MAGIC) {
      this.fault("TM_NBD_OPTION_MAGIC", `${part} begins with ${hex(header.magic)}`);
    }
    if (header.option !== option) {
      this.fault("TM_NBD_OPTION_ORDER", `server replied to option ${header.option}, asked was ${option}`);
    }
    if (header.length > MAX_OPTION_REPLY) {
      this.fault(
        "TM_NBD_OPTION_LENGTH",
        `${part} has ${header.length} bytes, at most ${MAX_OPTION_REPLY} make sense`,
      );
    }
    return { type: header.type, payload: await this.#stream.take(header.length, part) };
  }

  async #takeFirst(part: string): Promise<Buffer> {
    const explain = this.#explain;
    this.#explain = undefined;
    try {
      return await this.#stream.take(OPTION_REPLY_HEADER_SIZE, part);
    } catch (error) {
      throw explain === undefined ? error : explain(error as Error);
    }
  }

  /** A reply whose inner lengths do not fit its size shows as a RangeError of the cursor. */
  #handle(onReply: OptionReplyHandler, type: number, payload: Buffer): void {
    try {
      onReply(type, new ByteReader(payload));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      this.fault("TM_NBD_OPTION_REPLY", `reply ${type} of ${payload.length} bytes is malformed`);
    }
  }
}

function hex(magic: bigint): string {
  return `0x${magic.toString(16).padStart(16, "0")}`;
}
