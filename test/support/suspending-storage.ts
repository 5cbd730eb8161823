import type { IoOptions } from "../../src/bytes/index.js";
import type { Storage } from "../../src/storage/index.js";
import { SuspendedUser } from "./suspended-user.js";

/**
 * A storage whose user is suspended at one of the moments at which it may have lost its lock and find out in time: right
 * before it reads the lock, and right before an image takes its place.
 */
export class SuspendingStorage extends SuspendedUser {
  readonly #lock: string;
  readonly #at: number;
  #moments = 0;

  /**
   * @param lock key of the lock
   * @param at which of these moments, from 0
   */
  constructor(storage: Storage, lock: string, at: number) {
    super(storage);
    this.#lock = lock;
    this.#at = at;
  }

  /** How many such moments there were. */
  get moments(): number {
    return this.#moments;
  }

  override async get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    if (key === this.#lock) await this.#pass();
    return await super.get(key, options);
  }

  protected override beforeCommit(): Promise<void> {
    return this.#pass();
  }

  async #pass(): Promise<void> {
    const moment = this.#moments;
    this.#moments += 1;
    if (moment === this.#at) await this.suspend();
  }
}
