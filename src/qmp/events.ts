import { deferred, withDeadline, type Deferred } from "../flow/index.js";

/** What QEMU says unasked. */
export interface QmpEvent {
  readonly name: string;
  readonly data: Readonly<Record<string, unknown>>;
}

/** Which events a watch collects. */
export type EventFilter = (event: QmpEvent) => boolean;

/** How long to wait. */
export interface WaitOptions {
  readonly signal?: AbortSignal | undefined;
  /** Milliseconds; without it the wait lasts until the event, an abort or the end of the connection. */
  readonly timeoutMs?: number | undefined;
}

/**
 * Collects the events that match a filter, from the moment it is made: make it before the command whose
 * effect it waits for. Ends with the error when the connection dies.
 */
export class EventWatch implements Disposable {
  readonly #filter: EventFilter;
  readonly #onDispose: (watch: EventWatch) => void;
  readonly #collected: QmpEvent[] = [];
  readonly #waiting: Deferred<QmpEvent>[] = [];
  #ended: Error | undefined;

  /** Made by `QmpClient.watch`. */
  constructor(filter: EventFilter, onDispose: (watch: EventWatch) => void) {
    this.#filter = filter;
    this.#onDispose = onDispose;
  }

  /**
   * The next event that matches: one that was collected already, or else the first to come.
   *
   * @throws {DeadlineError} when `timeoutMs` is over
   * @throws {ConnectionError} when the connection is dead and nothing is left
   * @throws `signal.reason` when aborted
   */
  async next(options: WaitOptions = {}): Promise<QmpEvent> {
    const { signal, timeoutMs } = options;
    signal?.throwIfAborted();
    const collected = this.#collected.shift();
    if (collected !== undefined) return collected;
    if (this.#ended !== undefined) throw this.#ended;
    const waiter = deferred<QmpEvent>();
    this.#waiting.push(waiter);
    try {
      // Without a limit: 2^31 - 1 ms (24 days) is the longest timer that Node has.
      return await withDeadline(waiter.promise, timeoutMs ?? 2 ** 31 - 1, "Wait for an event of QEMU", {
        signal,
      });
    } finally {
      const index = this.#waiting.indexOf(waiter);
      if (index >= 0) this.#waiting.splice(index, 1);
    }
  }

  /** Called by the client for each event. */
  offer(event: QmpEvent): void {
    if (!this.#filter(event)) return;
    const waiter = this.#waiting.shift();
    if (waiter === undefined) this.#collected.push(event);
    else waiter.resolve(event);
  }

  /** Called by the client when the connection has ended. */
  end(error: Error): void {
    this.#ended = error;
    for (const waiter of this.#waiting.splice(0)) waiter.reject(error);
  }

  /** Stops collecting. */
  [Symbol.dispose](): void {
    this.#onDispose(this);
  }
}
