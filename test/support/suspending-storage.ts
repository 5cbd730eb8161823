import type { HeadLastSink, IoOptions } from "../../src/bytes/index.js";
import { deferred } from "../../src/flow/index.js";
import type {
  CreateOptions,
  ObjectEntry,
  ObjectReader,
  PutOptions,
  Storage,
} from "../../src/storage/index.js";

/**
 * A storage whose user is suspended at one of the moments at which it may have lost its lock and find out in time: right
 * before it reads the lock, and right before an image takes its place.
 */
export class SuspendingStorage implements Storage {
  readonly description: string;
  readonly #storage: Storage;
  readonly #lock: string;
  readonly #at: number;
  readonly #reached = deferred<undefined>();
  readonly #open = deferred<undefined>();
  #moments = 0;

  /**
   * @param lock key of the lock
   * @param at which of these moments, from 0
   */
  constructor(storage: Storage, lock: string, at: number) {
    this.#storage = storage;
    this.#lock = lock;
    this.#at = at;
    this.description = storage.description;
  }

  /** How many such moments there were. */
  get moments(): number {
    return this.#moments;
  }

  /** Resolves when the user is suspended. */
  get reached(): Promise<undefined> {
    return this.#reached.promise;
  }

  /** Lets the user go on. */
  wake(): void {
    this.#open.resolve(undefined);
  }

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    const sink = await this.#storage.create(key, options);
    return {
      append: (bytes) => sink.append(bytes),
      commit: async (head) => {
        await this.#pass();
        await sink.commit(head);
      },
      abort: () => sink.abort(),
    };
  }

  open(key: string, options?: IoOptions): Promise<ObjectReader> {
    return this.#storage.open(key, options);
  }

  async get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    if (key === this.#lock) await this.#pass();
    return await this.#storage.get(key, options);
  }

  put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    return this.#storage.put(key, bytes, options);
  }

  list(prefix: string, options?: IoOptions): AsyncIterable<ObjectEntry> {
    return this.#storage.list(prefix, options);
  }

  listFolders(prefix: string, options?: IoOptions): AsyncIterable<string> {
    return this.#storage.listFolders(prefix, options);
  }

  delete(key: string, options?: IoOptions): Promise<void> {
    return this.#storage.delete(key, options);
  }

  discardLeftovers(prefix: string, options?: IoOptions & { readonly before?: Date }): Promise<number> {
    return this.#storage.discardLeftovers(prefix, options);
  }

  async #pass(): Promise<void> {
    const moment = this.#moments;
    this.#moments += 1;
    if (moment !== this.#at) return;
    this.#reached.resolve(undefined);
    await this.#open.promise;
  }
}
