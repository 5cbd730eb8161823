import { NBD_CMD_BLOCK_STATUS, NBD_CMD_DISC, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_WRITE } from "./constants.js";
import { faultOf, NbdConnectionError, type Fault } from "./errors.js";
import { encodeExtendedRequest, encodeRequest, type RequestFrame } from "./frames.js";
import { ReplyParser, type ReplyContext } from "./replies.js";
import type { Request } from "./request.js";
import type { NbdSocket, Receiver } from "./socket.js";

/**
 * Requests in flight at most, on one connection. QEMU works on 16 at once; a client that sends hundreds
 * without reading replies deadlocks with it, both sides' buffers being full.
 */
export const MAX_IN_FLIGHT = 16;

/** A timer as late as this tells of a process that was held up. */
const HELD_UP_MS = 1000;
/** Longer timers fire at once. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** A source of requests that belong together. Asked for one more whenever a place is free. */
export interface Job {
  /** The next request; undefined when there is none (any more). */
  next(): Request | undefined;
  /** The connection ended while the job was in line, or the job is given up. */
  lost(reason: unknown): void;
}

export interface TransmissionOptions {
  readonly exportName: string;
  readonly structuredReplies: boolean;
  readonly extendedHeaders: boolean;
  /** Number of metadata contexts that were negotiated. */
  readonly contextCount: number;
  readonly requestTimeoutMs: number;
}

interface InFlight {
  readonly request: Request;
  readonly sentAt: number;
}

/**
 * The transmission phase of one connection: one reader, requests by their handle, jobs in line.
 * Handles are numbered from 1 and never used again, so one that is over is told from one that never was.
 */
export class Transmission implements Receiver, ReplyContext {
  readonly structuredReplies: boolean;
  readonly extendedHeaders: boolean;
  readonly fault: Fault;
  /** Resolves when the connection is gone: with the reason, or undefined after `close`. Never rejects. */
  readonly closed: Promise<Error | undefined>;
  readonly #socket: NbdSocket;
  readonly #options: TransmissionOptions;
  readonly #action: string;
  readonly #parser: ReplyParser;
  readonly #jobs: Job[] = [];
  /** In the order in which they were sent: the first one is the oldest. */
  readonly #inFlight = new Map<bigint, InFlight>();
  /** Requests that are over, of which so many more chunks may come (see `complete`). */
  readonly #trailing = new Map<bigint, number>();
  readonly #idle: (() => void)[] = [];
  #lastCookie = 0n;
  #end: { readonly reason: Error | undefined } | undefined;
  #closing = false;
  #timer: NodeJS.Timeout | undefined;
  #resolveClosed!: (reason: Error | undefined) => void;

  constructor(socket: NbdSocket, options: TransmissionOptions) {
    this.#socket = socket;
    this.#options = options;
    this.structuredReplies = options.structuredReplies;
    this.extendedHeaders = options.extendedHeaders;
    this.#action = `Connection to export ${JSON.stringify(options.exportName)} failed`;
    this.fault = faultOf(this.#action);
    this.#parser = new ReplyParser(this);
    this.closed = new Promise((resolve) => (this.#resolveClosed = resolve));
  }

  /** Becomes the socket's reader. @param early bytes that the handshake did not take */
  begin(early: Buffer): void {
    this.#socket.receive(this);
    if (early.length > 0) this.bytes(early);
  }

  /** Requests in flight. */
  get pending(): number {
    return this.#inFlight.size;
  }

  /** Why no more requests are taken; undefined while they are. */
  get refusal(): Error | undefined {
    if (this.#end === undefined && !this.#closing) return undefined;
    return this.#end?.reason ?? this.#over("TM_NBD_CLOSED", "it was closed");
  }

  /** Puts a job in line. */
  enqueue(job: Job): void {
    const { refusal } = this;
    if (refusal !== undefined) job.lost(refusal);
    else {
      this.#jobs.push(job);
      this.#pump();
    }
  }

  /** Takes nothing more, finishes what was taken, sends NBD_CMD_DISC and closes. */
  async close(): Promise<void> {
    if (this.#end === undefined && !this.#closing) {
      this.#closing = true;
      await this.#whenIdle();
      await this.#disconnect();
      this.end(undefined);
      this.#socket.destroy();
    }
    await this.closed;
  }

  /** Closes at once, also a connection that is held; everything pending ends with `reason`. */
  destroy(reason: Error | undefined): void {
    if (reason === undefined) this.cancel();
    else this.end(reason);
    this.#socket.destroy();
  }

  /** Gives the connection up; everything pending ends with `reason`. */
  end(reason: Error | undefined): void {
    if (this.#end !== undefined) return;
    this.#end = { reason };
    clearTimeout(this.#timer);
    const seen = reason ?? this.#over("TM_NBD_CLOSED", "it was closed");
    const lost = [...this.#inFlight.values()];
    this.#inFlight.clear();
    this.#socket.abandon();
    for (const { request } of lost) request.lost(seen);
    for (const job of this.#jobs.splice(0)) job.lost(seen);
    for (const wake of this.#idle.splice(0)) wake();
    this.#resolveClosed(reason);
  }

  /** Ends because this side wants it, not because of the server. */
  cancel(cause?: unknown): void {
    this.end(this.#over("TM_NBD_CLOSED", "it was closed before the answer", cause));
  }

  // Receiver

  bytes(chunk: Buffer): void {
    if (this.#end !== undefined) return;
    try {
      this.#parser.push(chunk);
    } catch (error) {
      this.end(error as Error);
      return;
    }
    this.#pump();
    if (this.#isIdle) for (const wake of this.#idle.splice(0)) wake();
  }

  ended(error: Error | undefined): void {
    if (error !== undefined) {
      const text = `${this.#action}: ${error.message}`;
      this.end(new NbdConnectionError("TM_NBD_CONNECTION", text, { cause: error }));
      return;
    }
    const { inside } = this.#parser;
    if (inside === undefined) {
      this.end(this.#over("TM_NBD_EOF", `server closed it, ${this.pending} requests unanswered`));
      return;
    }
    const code = inside.part === "header" ? "TM_NBD_EOF_HEADER" : "TM_NBD_EOF_PAYLOAD";
    const text = `server closed it after ${inside.have} of ${inside.need} bytes of a reply's ${inside.part}`;
    this.end(this.#over(code, text));
  }

  // ReplyContext

  find(cookie: bigint): Request | "skip" {
    const inFlight = this.#inFlight.get(cookie);
    if (inFlight !== undefined) return inFlight.request;
    const more = this.#trailing.get(cookie) ?? 0;
    if (more > 0) {
      this.#trailing.set(cookie, more - 1);
      return "skip";
    }
    if (cookie > 0n && cookie <= this.#lastCookie) {
      this.fault("TM_NBD_CHUNK_AFTER_DONE", `server sent a reply to request ${cookie}, which is complete`);
    }
    return this.fault("TM_NBD_UNKNOWN_HANDLE", `server replied to request ${cookie}, which was never made`);
  }

  /**
   * With several contexts on one connection, QEMU marks the error of one context as the last chunk of a block
   * status reply, and then sends those of the other contexts. They are dropped: at most one per context.
   */
  complete(cookie: bigint): void {
    const inFlight = this.#inFlight.get(cookie);
    if (inFlight === undefined) return;
    const { contextCount } = this.#options;
    if (inFlight.request.type === NBD_CMD_BLOCK_STATUS && inFlight.request.failure !== undefined) {
      if (contextCount > 1) this.#trailing.set(cookie, contextCount);
    }
    // Throws when the reply is not what it claims to be; the request is then among those that the end settles.
    inFlight.request.done();
    this.#inFlight.delete(cookie);
  }

  /** Fills the free places, job by job. */
  #pump(): void {
    while (this.#end === undefined && this.#inFlight.size < MAX_IN_FLIGHT) {
      const request = this.#jobs[0]?.next();
      if (request !== undefined) this.#send(request);
      else if (this.#jobs.length > 0) this.#jobs.shift();
      else return;
    }
  }

  #send(request: Request): void {
    this.#lastCookie += 1n;
    this.#inFlight.set(this.#lastCookie, { request, sentAt: performance.now() });
    const { type, flags, offset, length } = request;
    this.#write({ type, flags, cookie: this.#lastCookie, offset, length });
    if (request.payload !== undefined) this.#socket.write(request.payload);
    if (this.#timer === undefined) this.#watch(this.#options.requestTimeoutMs);
  }

  #write(frame: RequestFrame): void {
    if (!this.extendedHeaders) this.#socket.write(encodeRequest(frame));
    else {
      const payload = frame.type === NBD_CMD_WRITE ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
      this.#socket.write(encodeExtendedRequest({ ...frame, flags: frame.flags | payload }));
    }
  }

  /** One timer for all requests: looks at the oldest one when that would be overdue. */
  #watch(delay: number): void {
    const wait = Math.min(delay, MAX_TIMER_MS);
    const due = performance.now() + wait;
    this.#timer = setTimeout(() => {
      // A timer that is late means that this process was held up (suspended, busy): the answers may lie in the
      // socket, unread through no fault of the server.
      if (performance.now() - due > HELD_UP_MS) this.#watch(this.#options.requestTimeoutMs);
      else this.#checkOldest();
    }, wait);
  }

  #checkOldest(): void {
    this.#timer = undefined;
    if (this.#end !== undefined) return;
    const [oldest] = this.#inFlight.values();
    if (oldest === undefined) return;
    const left = oldest.sentAt + this.#options.requestTimeoutMs - performance.now();
    if (left > 0) {
      this.#watch(left);
      return;
    }
    const seconds = this.#options.requestTimeoutMs / 1000;
    this.end(this.#over("TM_NBD_TIMEOUT", `server did not answer a request within ${seconds} s`));
  }

  get #isIdle(): boolean {
    return this.#inFlight.size === 0 && this.#jobs.length === 0;
  }

  async #whenIdle(): Promise<void> {
    if (this.#isIdle || this.#end !== undefined) return;
    await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  async #disconnect(): Promise<void> {
    if (this.#end !== undefined) return;
    this.#lastCookie += 1n;
    const cookie = this.#lastCookie;
    this.#write({ type: NBD_CMD_DISC, flags: 0, cookie, offset: 0, length: 0 });
    await this.#socket.finish();
  }

  #over(code: string, why: string, cause?: unknown): NbdConnectionError {
    const details = cause === undefined ? {} : { cause };
    return new NbdConnectionError(code, `${this.#action}: ${why}`, details);
  }
}
