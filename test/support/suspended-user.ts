import type { HeadLastSink, IoOptions } from "../../src/bytes/index.js";
import { deferred } from "../../src/flow/index.js";
import type {
  CreateOptions,
  ObjectEntry,
  ObjectReader,
  PutOptions,
  Storage,
} from "../../src/storage/index.js";

/** A storage whose user can be suspended at a moment of the test's choice, until the test lets it go on. Else it passes everything on. */
export abstract class SuspendedUser implements Storage {
  readonly description: string;
  readonly #storage: Storage;
  readonly #reached = deferred<undefined>();
  readonly #open = deferred<undefined>();

  constructor(storage: Storage) {
    this.#storage = storage;
    this.description = storage.description;
  }

  /** Called before an object takes its place, by `commit` of what `create` returned. */
  protected abstract beforeCommit(key: string): Promise<void>;

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
        await this.beforeCommit(key);
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

  protected async suspend(): Promise<void> {
    this.#reached.resolve(undefined);
    await this.#open.promise;
  }
}
