import { clipRuns, decodeBlockStatus, type BlockRun } from "./block-status.js";
import { NBD_CMD_BLOCK_STATUS } from "./constants.js";
import { faultOf, NbdRequestError, type Fault } from "./errors.js";
import type { Request, RequestOwner } from "./request.js";

/** One of the contexts of a connection. */
export interface NegotiatedContext {
  readonly name: string;
  readonly id: number;
  /** Ids of all contexts of the connection: the server answers for each of them. */
  readonly knownIds: readonly number[];
}

/** The stretch of a block status request: what the caller wants, and its aligned form for the wire. */
export interface StatusRange {
  readonly offset: number;
  readonly length: number;
  readonly alignedOffset: number;
  readonly alignedLength: number;
}

/** NBD_CMD_BLOCK_STATUS: answers for one of the contexts of its connection. */
export class StatusRequest implements Request {
  readonly type = NBD_CMD_BLOCK_STATUS;
  readonly flags = 0;
  readonly fault: Fault;
  readonly #action: string;
  readonly #range: StatusRange;
  readonly #contextId: number;
  readonly #knownIds: readonly number[];
  readonly #seenIds = new Set<number>();
  readonly #owner: RequestOwner<StatusRequest>;
  #runs: readonly BlockRun[] = [];
  #failure: NbdRequestError | undefined;

  constructor(
    exportName: string,
    context: NegotiatedContext,
    range: StatusRange,
    owner: RequestOwner<StatusRequest>,
  ) {
    this.#range = range;
    this.#contextId = context.id;
    this.#knownIds = context.knownIds;
    this.#owner = owner;
    const where = `${range.length} bytes at ${range.offset} of export ${JSON.stringify(exportName)}`;
    this.#action = `Cannot read block status (${context.name}) of ${where}`;
    this.fault = faultOf(this.#action);
  }

  get offset(): number {
    return this.#range.alignedOffset;
  }

  get length(): number {
    return this.#range.alignedLength;
  }

  /** The answer, after success: at least one run. */
  get runs(): readonly BlockRun[] {
    return this.#runs;
  }

  get failure(): NbdRequestError | undefined {
    return this.#failure;
  }

  content(): Buffer {
    return this.fault("TM_NBD_REPLY_TYPE", "server answered a block status request with content");
  }

  status(contextId: number, payload: Buffer, isExtended: boolean): void {
    if (!this.#knownIds.includes(contextId)) {
      this.fault(
        "TM_NBD_UNKNOWN_CONTEXT",
        `server answered for context id ${contextId}, which it never gave`,
      );
    }
    if (this.#seenIds.has(contextId)) {
      this.fault("TM_NBD_REPEATED_CONTEXT", `server answered twice for context id ${contextId}`);
    }
    this.#seenIds.add(contextId);
    const runs = decodeBlockStatus(payload, isExtended, this.offset, this.length, this.fault);
    if (contextId !== this.#contextId) return;
    this.#runs = clipRuns(runs, this.#range.offset, this.#range.length);
  }

  failed(errno: number, text: string): void {
    this.#failure ??= new NbdRequestError(this.#action, errno, text);
  }

  done(): void {
    if (this.#failure === undefined && this.#runs.length === 0) {
      this.fault("TM_NBD_STATUS_MISSING", "server called its answer complete, nothing of this was in it");
    }
    this.#owner.settle(this, this.#failure);
  }

  lost(reason: Error): void {
    this.#owner.lost(reason);
  }
}
