import type { HeadLastSink, IoOptions } from "../../src/bytes/index.js";
import {
  MemoryStorage,
  ObjectReplacedError,
  StorageError,
  type CreateOptions,
  type ObjectEntry,
  type ObjectReader,
  type PutOptions,
  type Storage,
} from "../../src/storage/index.js";

/** The longest object of a test. */
const MAX_BYTES = 2 ** 30;

/**
 * Memory that serves readers as a bucket does: an object that was replaced or removed since it was opened cannot be
 * read any further. It knows which version of each object is there.
 */
export class PinnedMemory implements Storage {
  readonly description = "pinned memory";
  readonly #storage = new MemoryStorage();
  readonly #versions = new Map<string, number>();
  /** Objects that are being written. */
  readonly #unfinished = new Set<{ readonly key: string }>();
  /** How many changes there were: equal numbers, equal contents. */
  changes = 0;

  /** Key and version of every object. */
  get versions(): ReadonlyMap<string, number> {
    return this.#versions;
  }

  /** All of an object's bytes. */
  async bytes(key: string): Promise<Buffer> {
    return await this.#storage.get(key, { maxLength: MAX_BYTES });
  }

  /** Another one with the same objects. */
  async clone(): Promise<PinnedMemory> {
    const copy = new PinnedMemory();
    for (const key of this.#versions.keys()) await copy.put(key, await this.bytes(key));
    return copy;
  }

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    const sink = await this.#storage.create(key, options);
    const writer = { key };
    this.#unfinished.add(writer);
    return {
      append: (bytes) => sink.append(bytes),
      commit: async (head) => {
        if (!this.#unfinished.delete(writer))
          throw new StorageError("TM_STORAGE_CLOSED", `Cannot commit "${key}": what was written is gone`);
        await sink.commit(head);
        this.#changed(key);
      },
      abort: () => {
        this.#unfinished.delete(writer);
        return sink.abort();
      },
    };
  }

  async open(key: string, options?: IoOptions): Promise<ObjectReader> {
    const object = await this.#storage.open(key, options);
    const version = this.#versions.get(key);
    return {
      length: object.length,
      read: async (offset, length, io) => {
        if (this.#versions.get(key) !== version)
          throw new ObjectReplacedError(key, this.description, "it was replaced");
        return await object.read(offset, length, io);
      },
      close: () => object.close(),
    };
  }

  get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    return this.#storage.get(key, options);
  }

  async put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    const isWritten = await this.#storage.put(key, bytes, options);
    if (isWritten) this.#changed(key);
    return isWritten;
  }

  list(prefix: string, options?: IoOptions): AsyncIterable<ObjectEntry> {
    return this.#storage.list(prefix, options);
  }

  listFolders(prefix: string, options?: IoOptions): AsyncIterable<string> {
    return this.#storage.listFolders(prefix, options);
  }

  async delete(key: string, options?: IoOptions): Promise<void> {
    await this.#storage.delete(key, options);
    if (this.#versions.delete(key)) this.changes += 1;
  }

  discardLeftovers(prefix: string, options: IoOptions & { readonly before?: Date } = {}): Promise<number> {
    // What tests leave is younger than any date.
    const found = [...this.#unfinished].filter(({ key }) => key.startsWith(prefix));
    if (options.before !== undefined) return Promise.resolve(0);
    for (const writer of found) this.#unfinished.delete(writer);
    return Promise.resolve(found.length);
  }

  #changed(key: string): void {
    this.changes += 1;
    this.#versions.set(key, this.changes);
  }
}
