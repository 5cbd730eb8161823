import type { HeadLastSink, IoOptions } from "../../src/bytes/index.js";
import type {
  CreateOptions,
  ObjectEntry,
  ObjectReader,
  PutOptions,
  Storage,
} from "../../src/storage/index.js";

/** What every call gets after the crash. */
export class Crash extends Error {}

/**
 * A storage whose user dies at a chosen moment: at the n-th of all calls that change anything, just before or just after
 * it. From then on nothing can be called any more.
 */
export class CrashingStorage implements Storage {
  readonly description: string;
  readonly #storage: Storage;
  readonly #crashAt: number;
  #calls = 0;
  #hasCrashed = false;

  /** @param crashAt 0: before the first change, 1: after it, 2: before the second … */
  constructor(storage: Storage, crashAt: number) {
    this.#storage = storage;
    this.#crashAt = crashAt;
    this.description = storage.description;
  }

  /** Calls so far that change anything. */
  get calls(): number {
    return this.#calls;
  }

  get hasCrashed(): boolean {
    return this.#hasCrashed;
  }

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    const sink = await this.#change(() => this.#storage.create(key, options));
    return {
      append: (bytes) => this.#change(() => sink.append(bytes)),
      commit: (head) => this.#change(() => sink.commit(head)),
      // The dead clean up nothing.
      abort: () => (this.#hasCrashed ? Promise.resolve() : sink.abort()),
    };
  }

  open(key: string, options?: IoOptions): Promise<ObjectReader> {
    return this.#read(() => this.#storage.open(key, options));
  }

  get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    return this.#read(() => this.#storage.get(key, options));
  }

  put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    return this.#change(() => this.#storage.put(key, bytes, options));
  }

  async *list(prefix: string, options?: IoOptions): AsyncGenerator<ObjectEntry> {
    this.#requireAlive();
    yield* this.#storage.list(prefix, options);
  }

  async *listFolders(prefix: string, options?: IoOptions): AsyncGenerator<string> {
    this.#requireAlive();
    yield* this.#storage.listFolders(prefix, options);
  }

  delete(key: string, options?: IoOptions): Promise<void> {
    return this.#change(() => this.#storage.delete(key, options));
  }

  discardLeftovers(prefix: string, options?: IoOptions & { readonly before?: Date }): Promise<number> {
    return this.#change(() => this.#storage.discardLeftovers(prefix, options));
  }

  async #read<T>(work: () => Promise<T>): Promise<T> {
    this.#requireAlive();
    return await work();
  }

  async #change<T>(work: () => Promise<T>): Promise<T> {
    this.#requireAlive();
    const call = this.#calls;
    this.#calls += 1;
    if (this.#crashAt === 2 * call) this.#crash();
    const result = await work();
    if (this.#crashAt === 2 * call + 1) this.#crash();
    return result;
  }

  #crash(): never {
    this.#hasCrashed = true;
    throw new Crash("it died");
  }

  #requireAlive(): void {
    if (this.#hasCrashed) throw new Crash("it is dead");
  }
}
