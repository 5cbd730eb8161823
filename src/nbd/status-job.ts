import { roundDown, roundUp } from "../bytes/index.js";
import { deferred, type Deferred } from "../flow/index.js";
import type { BlockRun } from "./block-status.js";
import type { NbdRequestError } from "./errors.js";
import type { NbdExport } from "./export-info.js";
import type { RequestOwner } from "./request.js";
import { StatusRequest, type NegotiatedContext } from "./status-request.js";
import type { Job } from "./transmission.js";

/** One `blockStatus`: a single request, widened to the minimum block size. */
export class StatusJob implements Job, RequestOwner<StatusRequest> {
  readonly #request: StatusRequest;
  readonly #settlement: Deferred<readonly BlockRun[]> = deferred();
  #state: "in line" | "in flight" | "over" = "in line";

  constructor(source: NbdExport, context: NegotiatedContext, offset: number, length: number) {
    const { minimum } = source.blockSize;
    const end = offset + length;
    const alignedOffset = roundDown(offset, minimum);
    // The last block of an export may be a partial one. What is wanted beyond its end the server refuses.
    const alignedEnd = Math.min(roundUp(end, minimum), Math.max(source.size, end));
    const range = { offset, length, alignedOffset, alignedLength: alignedEnd - alignedOffset };
    this.#request = new StatusRequest(source.name, context, range, this);
  }

  /** Ends with the answer. */
  get result(): Promise<readonly BlockRun[]> {
    return this.#settlement.promise;
  }

  get inFlight(): number {
    return this.#state === "in flight" ? 1 : 0;
  }

  next(): StatusRequest | undefined {
    if (this.#state !== "in line") return undefined;
    this.#state = "in flight";
    return this.#request;
  }

  settle(request: StatusRequest, failure: NbdRequestError | undefined): void {
    this.#state = "over";
    if (failure === undefined) this.#settlement.resolve(request.runs);
    else this.#settlement.reject(failure);
  }

  lost(reason: unknown): void {
    if (this.#state === "in line") this.#state = "over";
    this.#settlement.reject(reason);
  }
}
