import type { HeadLastSink, IoOptions } from "../../src/bytes/index.js";
import { deferred } from "../../src/flow/index.js";
import type {
  CreateOptions,
  ObjectEntry,
  ObjectReader,
  PutOptions,
  Storage,
} from "../../src/storage/index.js";

/** A storage whose user is suspended right before one of its changes (a `put` is a commit, too), until the test lets it go on. */
export class GatedStorage implements Storage {
  readonly description: string;
  readonly #storage: Storage;
  readonly #operation: "commit" | "delete";
  readonly #key: string;
  readonly #reached = deferred<undefined>();
  readonly #open = deferred<undefined>();

  constructor(storage: Storage, operation: "commit" | "delete", key: string) {
    this.#storage = storage;
    this.#operation = operation;
    this.#key = key;
    this.description = storage.description;
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
        await this.#pass("commit", key);
        await sink.commit(head);
      },
      abort: () => sink.abort(),
    };
  }

  open(key: string, options?: IoOptions): Promise<ObjectReader> {
    return this.#storage.open(key, options);
  }

  get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    return this.#storage.get(key, options);
  }

  async put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    await this.#pass("commit", key);
    return await this.#storage.put(key, bytes, options);
  }

  list(prefix: string, options?: IoOptions): AsyncIterable<ObjectEntry> {
    return this.#storage.list(prefix, options);
  }

  listFolders(prefix: string, options?: IoOptions): AsyncIterable<string> {
    return this.#storage.listFolders(prefix, options);
  }

  async delete(key: string, options?: IoOptions): Promise<void> {
    await this.#pass("delete", key);
    await this.#storage.delete(key, options);
  }

  discardLeftovers(prefix: string, options?: IoOptions & { readonly before?: Date }): Promise<number> {
    return this.#storage.discardLeftovers(prefix, options);
  }

  async #pass(operation: "commit" | "delete", key: string): Promise<void> {
    if (operation !== this.#operation || key !== this.#key) return;
    this.#reached.resolve(undefined);
    await this.#open.promise;
  }
}
