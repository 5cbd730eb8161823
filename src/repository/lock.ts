import type { IoOptions } from "../bytes/index.js";
import { step } from "../flow/index.js";
import { thisHost, thisProcess } from "../process/index.js";
import type { Storage } from "../storage/index.js";
import { FencedError } from "./errors.js";
import { describeHolder, encodeHolder, readHolder, readOccupant, type Holder } from "./holder.js";
import { LOCK_TIMES, LockContest, type LockTimes } from "./lock-contest.js";

/**
 * A machine's lock in a repository: one run at a time changes the machine's points.
 *
 * The lock is an object that names its holder. It is made with `ifAbsent`, so that one of many comes first. A holder that
 * is provably gone, or that gave no sign of life for long, is succeeded: whoever makes the object
 * `lock.<token of the holder>` first is its one successor, and alone replaces the lock. (If the successor dies
 * in between, its own successor does so, and so on.) A holder may be alive after all, merely suspended: therefore it
 * asks `verify` right before and after every step that counts.
 */
export class MachineLock {
  /** Key of the lock. */
  readonly key: string;
  readonly #storage: Storage;
  readonly #times: LockTimes;
  readonly #lost = new AbortController();
  readonly #timer: NodeJS.Timeout;
  #holder: Holder;
  #beating: Promise<void> = Promise.resolve();
  /** What ended the last heartbeat, if anything did. */
  #failure: unknown;
  #isReleased = false;

  private constructor(storage: Storage, key: string, holder: Holder, times: LockTimes) {
    this.key = key;
    this.#storage = storage;
    this.#holder = holder;
    this.#times = times;
    this.#timer = setInterval(() => {
      this.#beating = this.#beating.then(() => this.#beat());
    }, times.heartbeat);
    this.#timer.unref();
  }

  /** @throws {LockedError} when another run holds the lock */
  static async acquire(
    storage: Storage,
    key: string,
    options: IoOptions & { readonly times?: LockTimes } = {},
  ): Promise<MachineLock> {
    const { signal, times = LOCK_TIMES } = options;
    const here = { ...(await thisProcess()), ...(await thisHost()) };
    const contest = new LockContest(storage, key, here, times, signal);
    const holder = await contest.win();
    return new MachineLock(storage, key, holder, times);
  }

  /** Random, new for each holding. */
  get token(): string {
    return this.#holder.token;
  }

  /** Aborted with a FencedError once a heartbeat has found that the lock was taken away. */
  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  /** Makes sure that the lock is still this run's. @throws {FencedError} when it is not */
  async verify(options: IoOptions = {}): Promise<void> {
    this.#lost.signal.throwIfAborted();
    const found = await readHolder(this.#storage, this.key, options);
    if (found?.token !== this.token || this.#isReleased) throw this.#fenced(found);
  }

  /** Gives the lock back, if it is still this run's. */
  async release(): Promise<void> {
    if (this.#isReleased) return;
    this.#isReleased = true;
    clearInterval(this.#timer);
    await this.#beating;
    const found = await readHolder(this.#storage, this.key);
    if (found?.token === this.token) await this.#storage.delete(this.key);
    await step("repository unlocked");
  }

  /** As `release`; a lock that cannot be given back is left to be found stale. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.release().catch(() => undefined);
  }

  /** A heartbeat that fails is not repeated but followed by the next; `verify` tells what it was about. */
  async #beat(): Promise<void> {
    if (this.#isReleased || this.#lost.signal.aborted) return;
    try {
      const signal = AbortSignal.timeout(this.#times.stale);
      const found = await readOccupant(this.#storage, this.key, { signal });
      // What became unreadable under a living holder is written anew: or else it would be taken for abandoned.
      const isDamaged = found !== undefined && "unreadable" in found;
      if (!isDamaged && found?.token !== this.token) {
        clearInterval(this.#timer);
        this.#lost.abort(this.#fenced(found));
        return;
      }
      const holder = { ...this.#holder, heartbeat: new Date().toISOString() };
      await this.#storage.put(this.key, encodeHolder(holder), { signal });
      this.#holder = holder;
      this.#failure = undefined;
    } catch (error) {
      this.#failure = error;
    }
  }

  #fenced(found: Holder | undefined): FencedError {
    const now = found === undefined ? "nobody holds it now" : `${describeHolder(found)} holds it now`;
    return new FencedError(`Cannot go on: lock "${this.key}" is no longer this run's, ${now}`, {
      cause: this.#failure,
    });
  }
}
