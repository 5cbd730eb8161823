import { pause } from "./pause.js";

/**
 * Holds a flow to a rate: each `pass(bytes)` waits until the bytes passed before it are paid for.
 * Up to `burst` seconds of unused rate are kept, so a stall is not followed by a stampede.
 */
export class RateLimit {
  readonly #bytesPerSecond: number;
  readonly #burst: number;
  #paidUntil = 0;

  /** @param bytesPerSecond the rate; `Infinity` never waits */
  constructor(bytesPerSecond: number, burst = 0.1) {
    this.#bytesPerSecond = bytesPerSecond;
    this.#burst = burst;
  }

  async pass(bytes: number, options: { readonly signal?: AbortSignal | undefined } = {}): Promise<void> {
    const { signal } = options;
    signal?.throwIfAborted();
    if (this.#bytesPerSecond === Infinity) return;
    const now = performance.now() / 1000;
    const start = Math.max(this.#paidUntil, now - this.#burst);
    this.#paidUntil = start + bytes / this.#bytesPerSecond;
    const wait = start - now;
    if (wait > 0) await pause(wait * 1000, signal);
  }
}
