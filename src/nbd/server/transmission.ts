import { ByteWriter, MiB, type IoOptions } from "../../bytes/index.js";
import { Budget } from "../../flow/index.js";
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EINVAL,
  NBD_EIO,
  NBD_ENOTSUP,
  NBD_EPERM,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REQUEST_MAGIC,
} from "../constants.js";
import { faultOf } from "../errors.js";
import { REQUEST_SIZE, type RequestFrame } from "../frames.js";
import { ChunkedReads } from "./chunked-reads.js";
import { decodeRequest, encodeChunk, encodeSimpleReply, type ReceivedRequest } from "./frames.js";
import type { Peer } from "./peer.js";
import { MAX_PAYLOAD, type Agreement, type ServedContext } from "./served-export.js";
import { READ_MEMORY, ReplyBroken, sendWhole } from "./whole-read.js";

/** Requests of one connection that are worked on at a time. */
const MAX_REQUESTS = 16;
/** Bytes of all of them together that are read and not yet sent: what a client can make a server hold. */
const MAX_BYTES = READ_MEMORY;
/** Bytes of reads that are answered together. */
const JOINED = MiB;
/** Runs of one block status reply; who wants to know more asks again. */
const MAX_RUNS = 16_384;

const fault = faultOf("Cannot serve NBD client");

/** A request that is refused; the connection goes on. */
class Refusal extends Error {
  readonly errno: number;

  constructor(errno: number, message: string) {
    super(message);
    this.errno = errno;
  }
}

/**
 * The server's side of the transmission: requests are worked on side by side, each answered as soon as it is done.
 * Returns when the client has taken its leave. Section "Transmission" of the specification.
 *
 * @param onFailure told of reads that fail: the client gets no more than EIO
 * @throws {NbdProtocolError} when the client breaks the protocol
 * @throws {PeerGone} when it leaves without a word
 */
export async function transmit(
  peer: Peer,
  agreement: Agreement,
  { signal, onFailure }: { readonly signal: AbortSignal; readonly onFailure: (error: unknown) => void },
): Promise<void> {
  await new Transmission(peer, agreement, signal, onFailure).run();
}

class Transmission {
  readonly #peer: Peer;
  readonly #agreement: Agreement;
  readonly #signal: AbortSignal;
  readonly #onFailure: (error: unknown) => void;
  readonly #requests = new Budget(MAX_REQUESTS);
  readonly #bytes = new Budget(MAX_BYTES);
  readonly #underWay = new Set<Promise<void>>();
  /** A request that was taken off the wire and not begun. */
  #next: ReceivedRequest | undefined;

  constructor(peer: Peer, agreement: Agreement, signal: AbortSignal, onFailure: (error: unknown) => void) {
    this.#peer = peer;
    this.#agreement = agreement;
    this.#signal = signal;
    this.#onFailure = onFailure;
  }

  async run(): Promise<void> {
    try {
      for (;;) {
        const request = this.#next ?? decodeRequest(await this.#peer.take(REQUEST_SIZE));
        this.#next = undefined;
        if (request.magic !== NBD_REQUEST_MAGIC)
          fault("TM_NBD_REQUEST_MAGIC", "a request begins with no magic");
        if (request.type === NBD_CMD_DISC) return;
        await this.#begin(request);
      }
    } finally {
      await Promise.all(this.#underWay);
    }
  }

  async #begin(request: ReceivedRequest): Promise<void> {
    if (request.type === NBD_CMD_WRITE) {
      if (request.length > MAX_PAYLOAD) fault("TM_NBD_PAYLOAD", `it writes ${request.length} bytes at once`);
      await this.#peer.skip(request.length);
    }
    const joined = this.#join(request);
    await this.#requests.take(joined.length, { signal: this.#signal });
    const work = (joined.length > 1 ? this.#workTogether(joined) : this.#work(request)).finally(() => {
      this.#requests.give(joined.length);
      this.#underWay.delete(work);
    });
    this.#underWay.add(work);
  }

  /** A request, and those behind it that are here already and go on where it ends. */
  #join(request: ReceivedRequest): readonly RequestFrame[] {
    const { export: disk } = this.#agreement;
    const joined = [request];
    let end = request.offset;
    const goesOn = ({ magic, type, flags, offset, length }: ReceivedRequest): boolean =>
      magic === NBD_REQUEST_MAGIC &&
      type === NBD_CMD_READ &&
      flags === 0 &&
      length > 0 &&
      offset === end &&
      offset + length <= Math.min(disk.size, request.offset + JOINED);
    if (!this.#agreement.isStructured || !goesOn(request)) return joined;
    for (end += request.length; joined.length < MAX_REQUESTS;) {
      const bytes = this.#peer.takeNow(REQUEST_SIZE);
      if (bytes === undefined) break;
      const next = decodeRequest(bytes);
      if (!goesOn(next)) {
        this.#next = next;
        break;
      }
      joined.push(next);
      end += next.length;
    }
    return joined;
  }

  /** Never throws. What fails together is tried one by one: an error belongs to those that it is about. */
  async #workTogether(requests: readonly RequestFrame[]): Promise<void> {
    const reads = new ChunkedReads(requests);
    const length = requests.reduce((sum, request) => sum + request.length, 0);
    try {
      await this.#holding(length, (options) => reads.send(this.#peer, this.#agreement.export, options));
    } catch {
      if (!this.#peer.isGone) await Promise.all(reads.left.map((request) => this.#work(request)));
    }
  }

  /** Never throws: what cannot be told to the client ends the connection, which the reader of requests sees. */
  async #work(request: RequestFrame): Promise<void> {
    try {
      await this.#answer(request);
    } catch (error) {
      if (!(error instanceof Refusal) && !this.#peer.isGone) this.#onFailure(error);
      if (error instanceof ReplyBroken) this.#peer.destroy();
      else await this.#refuse(request, error).catch(() => this.#peer.destroy());
    }
  }

  async #answer(request: RequestFrame): Promise<void> {
    switch (request.type) {
      case NBD_CMD_READ:
        this.#requireRange(request);
        await this.#read(request);
        return;
      case NBD_CMD_BLOCK_STATUS:
        this.#requireRange(request);
        await this.#blockStatus(request);
        return;
      case NBD_CMD_FLUSH:
        await this.#done(request);
        return;
      case NBD_CMD_CACHE:
        this.#requireRange(request);
        await this.#done(request);
        return;
      case NBD_CMD_WRITE:
      case NBD_CMD_WRITE_ZEROES:
      case NBD_CMD_TRIM:
        throw new Refusal(NBD_EPERM, "the export is read-only");
      default:
        throw new Refusal(NBD_ENOTSUP, `request type ${request.type} is not supported`);
    }
  }

  async #read(request: RequestFrame): Promise<void> {
    const { length, flags } = request;
    if (length > MAX_PAYLOAD) throw new Refusal(NBD_EINVAL, `at most ${MAX_PAYLOAD} bytes are read at once`);
    const isChunked = this.#agreement.isStructured && (flags & NBD_CMD_FLAG_DF) === 0;
    await this.#holding(length, async (options) => {
      if (isChunked) await new ChunkedReads([request]).send(this.#peer, this.#agreement.export, options);
      else await sendWhole(this.#peer, this.#agreement, request, options);
    });
  }

  /** Reads and sends so many bytes as soon as they may be in memory. */
  async #holding(length: number, work: (options: IoOptions) => Promise<void>): Promise<void> {
    const options = { signal: this.#signal };
    // A longer one is sent as it is read.
    const held = Math.min(length, MAX_BYTES);
    await this.#bytes.take(held, options);
    try {
      await work(options);
    } finally {
      this.#bytes.give(held);
    }
  }

  async #blockStatus(request: RequestFrame): Promise<void> {
    const { contexts } = this.#agreement;
    if (contexts.size === 0) throw new Refusal(NBD_EINVAL, "no metadata context was chosen");
    // All are collected before the first is sent: an error can then be told as one.
    const replies: Buffer[] = [];
    for (const [id, context] of contexts) {
      const runs = await this.#runs(context, request);
      const payload = new ByteWriter(4 + 8 * runs.length).u32(id);
      for (const { length, flags } of runs) payload.u32(length).u32(flags);
      replies.push(payload.finish());
    }
    for (const [index, payload] of replies.entries()) {
      const flags = index === replies.length - 1 ? NBD_REPLY_FLAG_DONE : 0;
      const { cookie } = request;
      await this.#peer.send(encodeChunk({ flags, type: NBD_REPLY_TYPE_BLOCK_STATUS, cookie }, payload));
    }
  }

  async #runs(context: ServedContext, request: RequestFrame): Promise<{ length: number; flags: number }[]> {
    const { offset, length } = request;
    const most = (request.flags & NBD_CMD_FLAG_REQ_ONE) === 0 ? MAX_RUNS : 1;
    const runs: { length: number; flags: number }[] = [];
    for await (const run of context.runs(offset, length, { signal: this.#signal })) {
      const covered = Math.min(run.offset + run.length, offset + length) - run.offset;
      const last = runs.at(-1);
      if (last?.flags === run.flags) last.length += covered;
      else if (runs.length === most) break;
      else runs.push({ length: covered, flags: run.flags });
    }
    return runs;
  }

  /** @throws {Refusal} for a range that is empty or not within the export */
  #requireRange({ offset, length, type }: RequestFrame): void {
    if (length === 0 && type !== NBD_CMD_READ) throw new Refusal(NBD_EINVAL, "the range is empty");
    const { size } = this.#agreement.export;
    if (offset + length > size)
      throw new Refusal(NBD_EINVAL, `the range exceeds the export of ${size} bytes`);
  }

  async #done({ cookie }: RequestFrame): Promise<void> {
    await this.#peer.send(
      this.#agreement.isStructured
        ? encodeChunk({ flags: NBD_REPLY_FLAG_DONE, type: NBD_REPLY_TYPE_NONE, cookie }, Buffer.alloc(0))
        : encodeSimpleReply(cookie, 0),
    );
  }

  async #refuse({ cookie }: RequestFrame, error: unknown): Promise<void> {
    const errno = error instanceof Refusal ? error.errno : NBD_EIO;
    if (!this.#agreement.isStructured) {
      await this.#peer.send(encodeSimpleReply(cookie, errno));
      return;
    }
    const text = Buffer.from(error instanceof Refusal ? error.message : "reading failed", "utf8");
    const payload = new ByteWriter(6 + text.length).u32(errno).u16(text.length).bytes(text).finish();
    await this.#peer.send(
      encodeChunk({ flags: NBD_REPLY_FLAG_DONE, type: NBD_REPLY_TYPE_ERROR, cookie }, payload),
    );
  }
}
