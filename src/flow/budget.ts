import { deferred, type Deferred } from "./deferred.js";

interface Waiter extends Deferred<undefined> {
  readonly amount: number;
}

/**
 * A bound on something in flight (bytes, requests), first come, first served.
 * A request larger than the whole budget is admitted alone, so nothing waits for ever.
 */
export class Budget {
  readonly limit: number;
  readonly #waiting: Waiter[] = [];
  #used = 0;
  #peak = 0;

  constructor(limit: number) {
    this.limit = limit;
  }

  get used(): number {
    return this.#used;
  }

  /** The most that was ever in flight at once. */
  get peak(): number {
    return this.#peak;
  }

  /** Waits until `amount` fits, then takes it. @throws `signal.reason` when aborted while waiting */
  async take(amount: number, options: { readonly signal?: AbortSignal | undefined } = {}): Promise<void> {
    options.signal?.throwIfAborted();
    if (this.#waiting.length === 0 && this.#fits(amount)) {
      this.#admit(amount);
      return;
    }
    const waiter: Waiter = { ...deferred<undefined>(), amount };
    this.#waiting.push(waiter);
    const onAbort = (): void => {
      const index = this.#waiting.indexOf(waiter);
      if (index < 0) return;
      this.#waiting.splice(index, 1);
      waiter.reject(options.signal?.reason);
      this.#admitWaiting();
    };
    options.signal?.addEventListener("abort", onAbort, { once: true });
    try {
      await waiter.promise;
    } finally {
      options.signal?.removeEventListener("abort", onAbort);
    }
  }

  /** Gives back what `take` took. */
  give(amount: number): void {
    this.#used -= amount;
    this.#admitWaiting();
  }

  #fits(amount: number): boolean {
    return this.#used === 0 || this.#used + amount <= this.limit;
  }

  #admit(amount: number): void {
    this.#used += amount;
    this.#peak = Math.max(this.#peak, this.#used);
  }

  #admitWaiting(): void {
    for (
      let next = this.#waiting[0];
      next !== undefined && this.#fits(next.amount);
      next = this.#waiting[0]
    ) {
      this.#waiting.shift();
      this.#admit(next.amount);
      next.resolve(undefined);
    }
  }
}
