import { GiB, MiB, roundDown, roundUp } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import { NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLUSH, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES } from "./constants.js";
import type { NbdExport } from "./export-info.js";
import { PlainJob } from "./plain-job.js";
import type { PlainFields } from "./plain-request.js";

/** What a writer needs of its connection. */
export interface WriterConnection {
  readonly export: NbdExport;
  /** Longest write request: a multiple of the minimum block size, within the maximum. */
  readonly requestSize: number;
  readonly run: (job: PlainJob, signal: AbortSignal | undefined) => Promise<unknown>;
  readonly read: (offset: number, target: Buffer, signal: AbortSignal | undefined) => Promise<void>;
}

/** A range that is to be changed. */
interface Stretch {
  readonly offset: number;
  readonly end: number;
}

/**
 * Longest NBD_CMD_WRITE_ZEROES with 32-bit headers, and of any that may not leave a hole: a server that has to
 * write the zeroes one by one must be able to answer 16 of them in time.
 */
const MAX_ZEROES = 32 * MiB;
/** With extended headers the maximum block size is that of a payload, and these have none. */
const MAX_EXTENDED_ZEROES = 1 * GiB;

/** Verbs for messages. */
const VERBS: ReadonlyMap<number, string> = new Map([
  [NBD_CMD_WRITE, "write"],
  [NBD_CMD_WRITE_ZEROES, "write zeroes to"],
]);

/** The writing side of one connection: cuts changes into requests that the server accepts. */
export class ExportWriter {
  readonly #connection: WriterConnection;
  #zeroes: Buffer | undefined;
  /** The last of the blocks that are read, changed and written: one after the other, as two may be the same block. */
  #patches: Promise<unknown> = Promise.resolve();

  constructor(connection: WriterConnection) {
    this.#connection = connection;
  }

  async write(offset: number, bytes: Buffer, signal: AbortSignal | undefined): Promise<void> {
    this.#requireWritable();
    const slice = (from: number, to: number): Buffer => bytes.subarray(from - offset, to - offset);
    await this.#change(
      { offset, end: offset + bytes.length },
      { slice, pieces: (body) => this.#writes(body, slice), signal },
    );
  }

  async writeZeroes(
    offset: number,
    length: number,
    noHole: boolean,
    signal: AbortSignal | undefined,
  ): Promise<void> {
    this.#requireWritable();
    const zeroes = (from: number, to: number): Buffer => this.#zeroBytes(to - from);
    const offered = this.#connection.export.flags.sendWriteZeroes;
    await this.#change(
      { offset, end: offset + length },
      {
        slice: zeroes,
        pieces: (body) => (offered ? this.#zeroRequests(body, noHole) : this.#writes(body, zeroes)),
        signal,
      },
    );
  }

  async flush(signal: AbortSignal | undefined): Promise<void> {
    if (!this.#connection.export.flags.sendFlush) return;
    const action = `Cannot flush ${this.#name}`;
    const job = new PlainJob([{ type: NBD_CMD_FLUSH, flags: 0, offset: 0, length: 0 }], () => action);
    await this.#connection.run(job, signal);
  }

  /**
   * Changes a range: whole blocks by requests of their own, an end that lies within a block by reading the block,
   * changing it and writing it. Settles when nothing is in flight any more.
   */
  async #change(
    { offset, end }: Stretch,
    how: {
      readonly slice: (from: number, to: number) => Buffer;
      readonly pieces: (body: Stretch) => Iterable<PlainFields>;
      readonly signal: AbortSignal | undefined;
    },
  ): Promise<void> {
    if (end === offset) return;
    const { slice, pieces, signal } = how;
    const { blockSize, size } = this.#connection.export;
    const { minimum } = blockSize;
    const bodyStart = Math.min(roundUp(offset, minimum), end);
    // The last block of an export may be a partial one.
    const bodyEnd = end === size ? end : Math.max(roundDown(end, minimum), bodyStart);

    const parts: Promise<unknown>[] = [];
    if (offset < bodyStart) parts.push(this.#patch(offset, slice(offset, bodyStart), signal));
    if (bodyStart < bodyEnd) {
      const job = new PlainJob(pieces({ offset: bodyStart, end: bodyEnd }), (piece) => this.#actionOf(piece));
      parts.push(this.#connection.run(job, signal));
    }
    if (bodyEnd < end) parts.push(this.#patch(bodyEnd, slice(bodyEnd, end), signal));
    const outcomes = await Promise.allSettled(parts);
    const failed = outcomes.find((outcome) => outcome.status === "rejected");
    if (failed !== undefined) throw failed.reason;
  }

  /** Bytes within one block: its other bytes are read and written back. */
  async #patch(offset: number, bytes: Buffer, signal: AbortSignal | undefined): Promise<void> {
    const patch = this.#patches.then(async () => {
      const { export: target, read, run } = this.#connection;
      const start = roundDown(offset, target.blockSize.minimum);
      const blockEnd = start + target.blockSize.minimum;
      const end = blockEnd > target.size ? Math.max(target.size, offset + bytes.length) : blockEnd;
      const block = Buffer.alloc(end - start);
      await read(start, block, signal);
      block.set(bytes, offset - start);
      const pieces = this.#writes({ offset: start, end }, () => block);
      await run(new PlainJob(pieces, (piece) => this.#actionOf(piece)), signal);
    });
    // The next one only waits for this one; whoever asked for this one hears of its failure.
    this.#patches = patch.catch(() => undefined);
    await patch;
  }

  *#writes({ offset, end }: Stretch, slice: (from: number, to: number) => Buffer): Generator<PlainFields> {
    for (let at = offset; at < end;) {
      const to = Math.min(at + this.#connection.requestSize, end);
      yield { type: NBD_CMD_WRITE, flags: 0, offset: at, length: to - at, payload: slice(at, to) };
      at = to;
    }
  }

  *#zeroRequests({ offset, end }: Stretch, noHole: boolean): Generator<PlainFields> {
    const { blockSize, extendedHeaders } = this.#connection.export;
    const { minimum, maximum } = blockSize;
    const few = extendedHeaders && !noHole;
    const longest = few
      ? MAX_EXTENDED_ZEROES
      : Math.max(roundDown(Math.min(MAX_ZEROES, maximum), minimum), minimum);
    const flags = noHole ? NBD_CMD_FLAG_NO_HOLE : 0;
    for (let at = offset; at < end;) {
      const to = Math.min(at + longest, end);
      yield { type: NBD_CMD_WRITE_ZEROES, flags, offset: at, length: to - at };
      at = to;
    }
  }

  #requireWritable(): void {
    if (!this.#connection.export.flags.readOnly) return;
    throw new UsageError(`Cannot write to ${this.#name}: it is read-only`, {
      hint: "The server has to offer it writable",
    });
  }

  #actionOf({ type, offset, length }: PlainFields): string {
    return `Cannot ${VERBS.get(type) ?? "send"} ${length} bytes at ${offset} of ${this.#name}`;
  }

  get #name(): string {
    return `export ${JSON.stringify(this.#connection.export.name)}`;
  }

  /** Shared by all requests of this connection; never longer than one. */
  #zeroBytes(length: number): Buffer {
    this.#zeroes ??= Buffer.alloc(this.#connection.requestSize);
    return this.#zeroes.subarray(0, length);
  }
}
