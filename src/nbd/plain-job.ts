import { deferred, type Deferred } from "../flow/index.js";
import type { NbdRequestError } from "./errors.js";
import { PlainRequest, type PlainFields } from "./plain-request.js";
import type { RequestOwner } from "./request.js";
import type { Job } from "./transmission.js";

/**
 * Requests without content in their answers, sent as places become free. After the first refusal nothing more
 * is sent. Settles only when nothing of it is in flight any more: afterwards nobody reads the buffers.
 */
export class PlainJob implements Job, RequestOwner<PlainRequest> {
  readonly #pieces: Iterator<PlainFields>;
  readonly #actionOf: (fields: PlainFields) => string;
  readonly #settlement: Deferred<undefined> = deferred();
  #ahead: PlainFields | undefined;
  #failure: NbdRequestError | undefined;
  #settled = false;
  #inFlight = 0;

  /**
   * @param pieces at least one
   * @param actionOf for messages: `Cannot write 512 bytes at 0 of export "sda"`
   */
  constructor(pieces: Iterable<PlainFields>, actionOf: (fields: PlainFields) => string) {
    this.#pieces = pieces[Symbol.iterator]();
    this.#actionOf = actionOf;
    this.#advance();
  }

  /** Ends with the last request. */
  get result(): Promise<undefined> {
    return this.#settlement.promise;
  }

  get inFlight(): number {
    return this.#inFlight;
  }

  next(): PlainRequest | undefined {
    const fields = this.#ahead;
    if (this.#settled || this.#failure !== undefined || fields === undefined) return undefined;
    this.#advance();
    this.#inFlight += 1;
    return new PlainRequest(fields, this.#actionOf(fields), this);
  }

  settle(_request: PlainRequest, failure: NbdRequestError | undefined): void {
    this.#inFlight -= 1;
    this.#failure ??= failure;
    if (this.#inFlight > 0 || this.#settled) return;
    if (this.#failure !== undefined) this.lost(this.#failure);
    else if (this.#ahead === undefined) {
      this.#settled = true;
      this.#settlement.resolve(undefined);
    }
  }

  lost(reason: unknown): void {
    this.#settled = true;
    this.#settlement.reject(reason);
  }

  #advance(): void {
    const step = this.#pieces.next();
    this.#ahead = step.done === true ? undefined : step.value;
  }
}
