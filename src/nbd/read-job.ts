import { roundDown, roundUp } from "../bytes/index.js";
import { deferred, type Deferred } from "../flow/index.js";
import type { NbdRequestError } from "./errors.js";
import type { NbdExport } from "./export-info.js";
import { ReadRequest } from "./read-request.js";
import type { RequestOwner } from "./request.js";
import type { Job } from "./transmission.js";

/** How reads are cut and sent; shared by all reads of a connection. */
export interface ReadPlan {
  readonly export: NbdExport;
  /** Longest request: a multiple of the minimum block size, within the maximum. */
  readonly requestSize: number;
  /** Whether reads carry NBD_CMD_FLAG_DF; ends when the server refuses one as too large. */
  dontFragment: boolean;
}

interface Stretch {
  readonly offset: number;
  readonly length: number;
}

/**
 * One `read`: cut into requests at multiples of the minimum block size. A request whose ends go beyond
 * what is wanted, because of that alignment, is read into a buffer of its own and copied; all others are
 * received straight into the caller's buffer. Settles only when nothing of it is in flight any more:
 * afterwards nobody writes to the buffer.
 */
export class ReadJob implements Job, RequestOwner<ReadRequest> {
  readonly #plan: ReadPlan;
  readonly #offset: number;
  readonly #target: Buffer;
  readonly #end: number;
  readonly #again: Stretch[] = [];
  readonly #settlement: Deferred<undefined> = deferred();
  readonly #requeue: (job: Job) => void;
  #next: number;
  #failure: NbdRequestError | undefined;
  #settled = false;
  #inFlight = 0;

  /** @param requeue puts the job in line once more, when something must be asked again */
  constructor(plan: ReadPlan, offset: number, target: Buffer, requeue: (job: Job) => void) {
    this.#plan = plan;
    this.#offset = offset;
    this.#target = target;
    this.#end = offset + target.length;
    this.#next = roundDown(offset, plan.export.blockSize.minimum);
    this.#requeue = requeue;
  }

  /** Ends with the read. */
  get result(): Promise<undefined> {
    return this.#settlement.promise;
  }

  /** Requests of this read in flight. */
  get inFlight(): number {
    return this.#inFlight;
  }

  next(): ReadRequest | undefined {
    if (this.#settled || this.#failure !== undefined) return undefined;
    const stretch = this.#again.pop() ?? this.#cut();
    if (stretch === undefined) return undefined;
    this.#inFlight += 1;
    const { name } = this.#plan.export;
    return new ReadRequest(name, stretch.offset, this.#placeFor(stretch), this.#plan.dontFragment, this);
  }

  settle(request: ReadRequest, failure: NbdRequestError | undefined): void {
    this.#inFlight -= 1;
    if (failure === undefined) this.#keep(request);
    else if (request.isTooLargeForOnePiece) {
      this.#plan.dontFragment = false;
      this.#again.push({ offset: request.offset, length: request.length });
      this.#requeue(this);
    } else this.#failure ??= failure;
    if (this.#inFlight > 0 || this.#settled) return;
    if (this.#failure !== undefined) this.lost(this.#failure);
    else if (this.#next >= this.#end && this.#again.length === 0) {
      this.#settled = true;
      this.#settlement.resolve(undefined);
    }
  }

  lost(reason: unknown): void {
    this.#settled = true;
    this.#settlement.reject(reason);
  }

  #cut(): Stretch | undefined {
    if (this.#next >= this.#end) return undefined;
    const { export: source, requestSize } = this.#plan;
    const offset = this.#next;
    // The last block of an export may be a partial one. What is wanted beyond its end the server refuses.
    const limit = Math.max(source.size, this.#end);
    const end = Math.min(offset + requestSize, roundUp(this.#end, source.blockSize.minimum), limit);
    this.#next = end;
    return { offset, length: end - offset };
  }

  #placeFor({ offset, length }: Stretch): Buffer {
    if (offset < this.#offset || offset + length > this.#end) return Buffer.allocUnsafe(length);
    return this.#target.subarray(offset - this.#offset, offset - this.#offset + length);
  }

  #keep({ offset, target }: ReadRequest): void {
    if (offset >= this.#offset && offset + target.length <= this.#end) return;
    const from = Math.max(offset, this.#offset);
    const to = Math.min(offset + target.length, this.#end);
    target.copy(this.#target, from - this.#offset, from - offset, to - offset);
  }
}
