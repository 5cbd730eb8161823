import { GiB, KiB, roundDown } from "../bytes/index.js";
import { NotFoundError } from "../errors/index.js";
import type { NbdAddress } from "./address.js";
import { joinRuns, type BlockRun } from "./block-status.js";
import type { NbdExport } from "./export-info.js";
import { ExportWriter } from "./export-writer.js";
import type { NegotiateOptions } from "./negotiate-options.js";
import { ReadJob, type ReadPlan } from "./read-job.js";
import type { NbdSocket } from "./socket.js";
import { StatusJob } from "./status-job.js";
import { Transmission, type Job } from "./transmission.js";

/** How a client came to be: enough to do it once more. */
export interface ClientOrigin {
  readonly address: NbdAddress;
  readonly negotiated: NegotiateOptions;
}

/** What was settled before transmission and is not part of the export. */
export interface ClientSettings {
  /** Ids of the negotiated contexts, by name. */
  readonly contextIds: ReadonlyMap<string, number>;
  /** Longest read or write request wanted, in bytes. */
  readonly requestSize: number;
  readonly requestTimeoutMs: number;
  readonly origin: ClientOrigin;
}

/** Options of everything that asks the server. */
export interface RequestOptions {
  readonly signal?: AbortSignal | undefined;
}

/** Longest range of one block status request with 32-bit headers: below 4 GiB, and a multiple of any minimum block size. */
export const MAX_STATUS_LENGTH = 4 * GiB - 64 * KiB;

/**
 * One connection to one export, in transmission. Made by `negotiate` or `connect`.
 *
 * All methods may be called at any time, also while others are waiting: requests stand in line for 16 places.
 * A request that the server refuses rejects with `NbdRequestError` and the connection lives on. Everything else
 * ends the connection and every request on it: `NbdProtocolError`, `NbdConnectionError` (also when one request
 * stayed unanswered for too long). A socket that was opened to be held stays open all the same, of no use, until
 * `destroy`.
 */
export class NbdClient {
  readonly export: NbdExport;
  /** For `reconnect`. */
  readonly origin: ClientOrigin;
  readonly #contextIds: ReadonlyMap<string, number>;
  readonly #transmission: Transmission;
  readonly #plan: ReadPlan;
  readonly #writer: ExportWriter;

  /** Use `negotiate`. */
  constructor(socket: NbdSocket, source: NbdExport, settings: ClientSettings) {
    this.export = source;
    this.origin = settings.origin;
    this.#contextIds = settings.contextIds;
    this.#transmission = new Transmission(socket, {
      exportName: source.name,
      structuredReplies: source.structuredReplies,
      extendedHeaders: source.extendedHeaders,
      contextCount: settings.contextIds.size,
      requestTimeoutMs: settings.requestTimeoutMs,
    });
    const { minimum, maximum } = source.blockSize;
    const longest = Math.min(settings.requestSize, maximum);
    this.#plan = {
      export: source,
      requestSize: Math.max(roundDown(longest, minimum), minimum),
      dontFragment: source.flags.sendDf,
    };
    this.#writer = new ExportWriter({
      export: source,
      requestSize: this.#plan.requestSize,
      run: (job, signal) => this.#run(job, signal),
      read: (offset, target, signal) => this.read(offset, target, { signal }),
    });
  }

  /** For `negotiate`: takes over the socket. @param early bytes that the handshake did not take */
  begin(early: Buffer): void {
    this.#transmission.begin(early);
  }

  /** Requests in flight. */
  get pending(): number {
    return this.#transmission.pending;
  }

  /** Resolves when the connection is gone: with the reason, or undefined after `close`. Never rejects. */
  get closed(): Promise<Error | undefined> {
    return this.#transmission.closed;
  }

  /**
   * Fills `target` with the export's bytes from `offset`: as several requests, in any order, at most 16 in
   * flight on the connection in all, NBD_CMD_FLAG_DF set where the server offers it. Bytes are received straight
   * into `target`, except at ends that are not aligned to the export's minimum block size.
   *
   * Aborting while requests of this read are in flight destroys the connection: there is no other way to
   * keep the server from answering into the buffer.
   *
   * @throws {NbdRequestError} when the server refuses, for instance beyond the end; then part of `target` may be filled
   * @throws `signal.reason` when aborted
   */
  async read(offset: number, target: Buffer, options: RequestOptions = {}): Promise<void> {
    const { signal } = options;
    signal?.throwIfAborted();
    requireRange(offset, target.length);
    if (target.length === 0) return;
    const job = new ReadJob(this.#plan, offset, target, (again) => this.#transmission.enqueue(again));
    await this.#run(job, signal);
  }

  /**
   * One NBD_CMD_BLOCK_STATUS: what one context says of a range, runs in order, beginning at `offset`. They may
   * cover less than asked, at least one byte, and never reach past the range.
   *
   * Negotiate one context per connection: with several, QEMU answers for all of them at each request, and
   * goes on after an error of one (those chunks are dropped).
   *
   * @param length bytes, at most 4 GiB - 64 KiB where the export lacks `extendedHeaders`
   * @throws {NotFoundError} TM_NBD_NO_CONTEXT when the context was not negotiated or the server lacks it
   * @throws {NbdRequestError} when the server refuses
   * @throws `signal.reason` when aborted; the connection is destroyed if the request was sent
   */
  async blockStatus(
    context: string,
    offset: number,
    length: number,
    options: RequestOptions = {},
  ): Promise<readonly BlockRun[]> {
    const { signal } = options;
    signal?.throwIfAborted();
    const id = this.#contextIds.get(context);
    if (id === undefined) {
      const where = `export ${JSON.stringify(this.export.name)}`;
      throw new NotFoundError(
        "TM_NBD_NO_CONTEXT",
        `Cannot read ${context} of ${where}: server has no such map`,
      );
    }
    requireRange(offset, length);
    if (length > this.#maxStatusLength) throw new RangeError(`block status of ${length} bytes: too long`);
    if (length === 0) return [];

    const negotiated = { name: context, id, knownIds: [...this.#contextIds.values()] };
    const job = new StatusJob(this.export, negotiated, offset, length);
    return this.#run(job, signal);
  }

  /**
   * The map of a whole range, as many requests as needed, neighbours with equal flags joined.
   *
   * @param options.offset default 0
   * @param options.length default: to the end of the export
   * @throws as `blockStatus`
   */
  map(
    context: string,
    options: RequestOptions & { readonly offset?: number; readonly length?: number } = {},
  ): AsyncGenerator<BlockRun> {
    const { offset = 0, length = this.export.size - offset } = options;
    return joinRuns(this.#batches(context, offset, offset + length, options));
  }

  async *#batches(
    context: string,
    offset: number,
    end: number,
    options: RequestOptions,
  ): AsyncGenerator<readonly BlockRun[]> {
    for (let at = offset; at < end;) {
      const runs = await this.blockStatus(context, at, Math.min(end - at, this.#maxStatusLength), options);
      const last = runs.at(-1);
      if (last === undefined) return;
      yield runs;
      at = last.offset + last.length;
    }
  }

  /**
   * Writes `bytes` at `offset`: as several requests, in any order, at most 16 in flight on the connection in all.
   * The buffer must not change until this settles. A range that does not begin or end at a multiple of the
   * export's minimum block size is completed by reading the block there and writing it back: nobody else may
   * write to such a block at the same time. Resolved means that the server has the bytes, not that they last:
   * see `flush`.
   *
   * Aborting while requests of this write are in flight destroys the connection.
   *
   * @throws {UsageError} when the export is read-only
   * @throws {NbdRequestError} when the server refuses (ENOSPC, EIO, EPERM, beyond the end); then part may be written
   * @throws `signal.reason` when aborted
   */
  async write(offset: number, bytes: Buffer, options: RequestOptions = {}): Promise<void> {
    const { signal } = options;
    signal?.throwIfAborted();
    requireRange(offset, bytes.length);
    await this.#writer.write(offset, bytes, signal);
  }

  /**
   * Makes a range read as zeroes, by NBD_CMD_WRITE_ZEROES in requests of up to 32 MiB (and the export's maximum
   * block size), of up to 1 GiB where the export has `extendedHeaders`; by plain writes where the server does not offer it. Else as `write`.
   *
   * @param options.noHole the range must stay allocated (NBD_CMD_FLAG_NO_HOLE); default: the server may punch a hole
   * @throws as `write`
   */
  async writeZeroes(
    offset: number,
    length: number,
    options: RequestOptions & { readonly noHole?: boolean } = {},
  ): Promise<void> {
    const { signal, noHole = false } = options;
    signal?.throwIfAborted();
    requireRange(offset, length);
    await this.#writer.writeZeroes(offset, length, noHole, signal);
  }

  /**
   * Makes all that was written last (NBD_CMD_FLUSH): every write that was resolved before, on this connection,
   * and, where the export says `canMultiConn`, on all others to it. A server that does not offer it has nothing to
   * flush.
   *
   * @throws {NbdRequestError} when the server fails to
   * @throws `signal.reason` when aborted
   */
  async flush(options: RequestOptions = {}): Promise<void> {
    const { signal } = options;
    signal?.throwIfAborted();
    await this.#writer.flush(signal);
  }

  /**
   * Waits for what was asked before, sends NBD_CMD_DISC and closes; refuses what is asked afterwards. Never
   * fails; harmless when the connection is gone.
   */
  async close(): Promise<void> {
    await this.#transmission.close();
  }

  /**
   * Closes at once, saying nothing; pending requests end with `reason`. The kernel's connection lives on as long
   * as another process holds a duplicate of the descriptor.
   */
  destroy(reason?: Error): void {
    this.#transmission.destroy(reason);
  }

  get #maxStatusLength(): number {
    return this.export.extendedHeaders ? Number.MAX_SAFE_INTEGER : MAX_STATUS_LENGTH;
  }

  /** Puts a job in line and waits for it. */
  async #run<T>(job: Job & { readonly result: Promise<T>; readonly inFlight: number }, signal?: AbortSignal) {
    const abort = (): void => {
      job.lost(signal?.reason);
      if (job.inFlight > 0) this.#transmission.cancel(signal?.reason);
    };
    signal?.addEventListener("abort", abort, { once: true });
    try {
      this.#transmission.enqueue(job);
      return await job.result;
    } finally {
      signal?.removeEventListener("abort", abort);
    }
  }
}

function requireRange(offset: number, length: number): void {
  if (Number.isSafeInteger(offset) && offset >= 0 && length >= 0 && Number.isSafeInteger(offset + length))
    return;
  throw new RangeError(`${length} bytes at ${offset} are not a range`);
}
