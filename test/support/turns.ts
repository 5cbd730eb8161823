import type { HeadLastSink, IoOptions } from "../../src/bytes/index.js";
import type {
  CreateOptions,
  ObjectEntry,
  ObjectReader,
  PutOptions,
  Storage,
} from "../../src/storage/index.js";

/** A random number from 0 to 1, the same sequence for the same seed. */
export function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Lets those who work side by side go on one at a time, each as far as its next call of the storage: whose turn it is, is random. */
export class Turns {
  readonly #random: () => number;
  readonly #waiting: (() => void)[] = [];
  #isRunning = false;

  constructor(random: () => number) {
    this.#random = random;
  }

  /** Waits for a turn. */
  async next(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#waiting.push(resolve);
      if (this.#isRunning) return;
      this.#isRunning = true;
      setImmediate(() => this.#give());
    });
  }

  #give(): void {
    const [resolve] = this.#waiting.splice(Math.floor(this.#random() * this.#waiting.length), 1);
    resolve?.();
    this.#isRunning = this.#waiting.length > 0;
    if (this.#isRunning) setImmediate(() => this.#give());
  }
}

/** A storage whose user waits for its turn before every call, reads of open objects included. */
export class TakingTurns implements Storage {
  readonly description: string;
  readonly #storage: Storage;
  readonly #turns: Turns;
  /** What is behind the readers that were given out. */
  readonly #behind = new WeakMap<ObjectReader, ObjectReader>();

  constructor(storage: Storage, turns: Turns) {
    this.description = storage.description;
    this.#storage = storage;
    this.#turns = turns;
  }

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    await this.#turns.next();
    const { base } = options;
    const object = base === undefined ? undefined : (this.#behind.get(base.object) ?? base.object);
    const begun =
      base === undefined || object === undefined ? options : { ...options, base: { ...base, object } };
    const sink = await this.#storage.create(key, begun);
    return {
      append: async (bytes) => {
        await this.#turns.next();
        await sink.append(bytes);
      },
      commit: async (head) => {
        await this.#turns.next();
        await sink.commit(head);
      },
      abort: () => sink.abort(),
    };
  }

  async open(key: string, options?: IoOptions): Promise<ObjectReader> {
    await this.#turns.next();
    const object = await this.#storage.open(key, options);
    const reader: ObjectReader = {
      length: object.length,
      read: async (offset, length, io) => {
        await this.#turns.next();
        return await object.read(offset, length, io);
      },
      close: () => object.close(),
    };
    this.#behind.set(reader, object);
    return reader;
  }

  async get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    await this.#turns.next();
    return await this.#storage.get(key, options);
  }

  async put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    await this.#turns.next();
    return await this.#storage.put(key, bytes, options);
  }

  async *list(prefix: string, options?: IoOptions): AsyncGenerator<ObjectEntry> {
    await this.#turns.next();
    yield* this.#storage.list(prefix, options);
  }

  async *listFolders(prefix: string, options?: IoOptions): AsyncGenerator<string> {
    await this.#turns.next();
    yield* this.#storage.listFolders(prefix, options);
  }

  async delete(key: string, options?: IoOptions): Promise<void> {
    await this.#turns.next();
    await this.#storage.delete(key, options);
  }

  async discardLeftovers(prefix: string, options?: IoOptions & { readonly before?: Date }): Promise<number> {
    await this.#turns.next();
    return await this.#storage.discardLeftovers(prefix, options);
  }
}
