import { Budget } from "../../flow/index.js";

/**
 * Writes that are under way: begun one after the other, answered in any order, bounded by the bytes that they hold. What
 * one of them meets is told by the next call.
 */
export class UnderWay {
  readonly #inFlight: Budget;
  readonly #running = new Set<Promise<void>>();
  readonly #failure = new AbortController();

  /** @param limit bytes */
  constructor(limit: number) {
    this.#inFlight = new Budget(limit);
  }

  /** Begins a write as soon as there is room for it. @throws what a write before met */
  async begin(bytes: number, write: () => Promise<void>): Promise<void> {
    await this.#inFlight.take(bytes, this.#failure);
    const running = write()
      .catch((error: unknown) => this.#failure.abort(error))
      .finally(() => {
        this.#inFlight.give(bytes);
        this.#running.delete(running);
      });
    this.#running.add(running);
  }

  /** Resolves when none is under way. @throws what any of them met */
  async settle(): Promise<void> {
    await this.end();
    this.#failure.signal.throwIfAborted();
  }

  /** Resolves when none is under way, whatever became of them. Never throws. */
  async end(): Promise<void> {
    await Promise.all(this.#running);
  }
}
