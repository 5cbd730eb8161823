import type { IoOptions } from "../bytes/index.js";
import { RateLimit } from "../flow/index.js";

/** Told how far a rewriting has come. */
export interface RewriteObserver {
  /** @param event.done bytes moved, of `total`; estimates: the total may shrink where blocks are shared instead of copied */
  progress?(event: { readonly done: number; readonly total: number }): void;
}

export interface MovementOptions extends IoOptions {
  /** Bytes a second; default as fast as it goes. */
  readonly bandwidth?: number | undefined;
  readonly observer?: RewriteObserver | undefined;
}

/** The bytes that a change of a chain moves: counted against what was planned, and held to a rate. */
export class Movement {
  readonly #rate: RateLimit;
  readonly #options: MovementOptions;
  #total = 0;
  /** Of images that are finished. */
  #finished = 0;
  /** Of the image that is being written: planned, and moved. */
  #planned = 0;
  #moved = 0;
  /** What was told last. */
  #told: { readonly done: number; readonly total: number } | undefined;

  constructor(options: MovementOptions = {}) {
    this.#options = options;
    this.#rate = new RateLimit(options.bandwidth ?? Infinity);
  }

  /** @param total bytes of all images that are to be written */
  begin(total: number): void {
    this.#total = total;
    this.#report();
  }

  /** @param planned bytes of the image that comes next */
  beginImage(planned: number): void {
    this.#planned = planned;
    this.#moved = 0;
  }

  /** Waits until so many bytes may be moved. */
  async pass(bytes: number): Promise<void> {
    await this.#rate.pass(bytes, this.#options);
    // What is planned is an estimate.
    this.#moved = Math.min(this.#moved + bytes, this.#planned);
    this.#report();
  }

  /** So many bytes of the image do not have to be moved after all. */
  spare(bytes: number): void {
    this.#planned -= bytes;
    this.#total -= bytes;
    this.#moved = Math.min(this.#moved, this.#planned);
    this.#report();
  }

  endImage(): void {
    this.#finished += this.#planned;
    this.#planned = this.#moved = 0;
    this.#report();
  }

  #report(): void {
    const event = { done: this.#finished + this.#moved, total: this.#total };
    if (event.done === this.#told?.done && event.total === this.#told.total) return;
    this.#told = event;
    this.#options.observer?.progress?.(event);
  }
}
