import type { HeadLastSink } from "../bytes/index.js";
import type { CreateOptions, ObjectEntry, ObjectReader, PutOptions, Storage } from "./storage.js";

/** How long a storage may keep silent once the user wants to leave, in milliseconds. */
const PATIENCE = 5000;
/** … once he insists. */
const HURRIED_PATIENCE = 1000;

export interface InterruptibleOptions {
  /** The user wants to leave. */
  readonly signal: AbortSignal;
  /** … and insists: a second of silence is enough then. */
  readonly hurry?: AbortSignal | undefined;
  /** Milliseconds without any answer, from the abort on, after which the storage is left; default 5000. */
  readonly patience?: number | undefined;
}

/**
 * A storage that can be left although it does not answer: a network share whose server went away. Until the signal is
 * aborted it waits like the other. Then it may go on as long as it gives some answer now and then, since tidying up is
 * asked of it, too; when it keeps silent, it is given up, and nothing more is asked: everything rejects with the signal's reason. What an operation that
 * was given up still does shows later, if at all: as after the death of the process.
 */
export function interruptible(storage: Storage, options: InterruptibleOptions): Storage {
  return new InterruptibleStorage(storage, new Departure(options));
}

/** When to stop waiting. */
class Departure {
  readonly #signal: AbortSignal;
  /** What is waited for, each to be given up by its function. */
  readonly #waiting = new Set<() => void>();
  #patience: number;
  #timer: NodeJS.Timeout | undefined;
  #isOver = false;

  constructor({ signal, hurry, patience = PATIENCE }: InterruptibleOptions) {
    this.#signal = signal;
    this.#patience = patience;
    const restart = (): void => this.#restart();
    const shorten = (): void => {
      this.#patience = Math.min(this.#patience, HURRIED_PATIENCE);
      this.#restart();
    };
    if (!signal.aborted) signal.addEventListener("abort", restart, { once: true });
    if (hurry?.aborted === true) shorten();
    else hurry?.addEventListener("abort", shorten, { once: true });
  }

  /** Waits for an operation as long as there is time. @param undo ends what comes too late */
  async wait<T>(act: () => Promise<T>, undo?: (late: T) => Promise<void>): Promise<T> {
    if (this.#isOver) throw this.#signal.reason as Error;
    return await new Promise<T>((resolve, reject) => {
      let isLate = false;
      const giveUp = (): void => {
        isLate = true;
        reject(this.#signal.reason as Error);
      };
      const end = (): void => {
        this.#waiting.delete(giveUp);
        this.#restart();
      };
      this.#waiting.add(giveUp);
      if (this.#timer === undefined) this.#restart();
      act()
        .finally(end)
        .then((value) => {
          if (isLate) void undo?.(value);
          else resolve(value);
        }, reject);
    });
  }

  /** Every answer is a sign of life. The time runs only while something is waited for. */
  #restart(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (!this.#signal.aborted || this.#isOver || this.#waiting.size === 0) return;
    this.#timer = setTimeout(() => this.#leave(), this.#patience);
  }

  #leave(): void {
    this.#isOver = true;
    for (const giveUp of this.#waiting) giveUp();
    this.#waiting.clear();
  }
}

class InterruptibleReader implements ObjectReader {
  readonly length: number;
  readonly reader: ObjectReader;
  readonly #departure: Departure;

  constructor(reader: ObjectReader, departure: Departure) {
    this.length = reader.length;
    this.reader = reader;
    this.#departure = departure;
  }

  read(...range: Parameters<ObjectReader["read"]>): Promise<Buffer> {
    return this.#departure.wait(() => this.reader.read(...range));
  }

  close(): Promise<void> {
    return this.#departure.wait(() => this.reader.close()).catch(() => undefined);
  }
}

class InterruptibleStorage implements Storage {
  readonly description: string;
  readonly #storage: Storage;
  readonly #departure: Departure;

  constructor(storage: Storage, departure: Departure) {
    this.description = storage.description;
    this.#storage = storage;
    this.#departure = departure;
  }

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    const departure = this.#departure;
    const { base } = options;
    // The storage knows its own readers, and how to share with them what they read.
    const object = base?.object instanceof InterruptibleReader ? base.object.reader : base?.object;
    const begun = base === undefined || object === undefined ? undefined : { ...base, object };
    const sink = await departure.wait(
      () => this.#storage.create(key, { ...options, base: begun }),
      (late) => late.abort(),
    );
    return {
      append: (bytes) => departure.wait(() => sink.append(bytes)),
      commit: (head) => departure.wait(() => sink.commit(head)),
      // It never throws, and nobody has to wait for it to go on.
      abort: () => departure.wait(() => sink.abort()).catch(() => undefined),
    };
  }

  async open(...args: Parameters<Storage["open"]>): Promise<ObjectReader> {
    const departure = this.#departure;
    const reader = await departure.wait(
      () => this.#storage.open(...args),
      (late) => late.close(),
    );
    return new InterruptibleReader(reader, departure);
  }

  get(...args: Parameters<Storage["get"]>): Promise<Buffer> {
    return this.#departure.wait(() => this.#storage.get(...args));
  }

  put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    return this.#departure.wait(() => this.#storage.put(key, bytes, options));
  }

  list(...args: Parameters<Storage["list"]>): AsyncIterable<ObjectEntry> {
    return this.#each(this.#storage.list(...args));
  }

  listFolders(...args: Parameters<Storage["listFolders"]>): AsyncIterable<string> {
    return this.#each(this.#storage.listFolders(...args));
  }

  delete(...args: Parameters<Storage["delete"]>): Promise<void> {
    return this.#departure.wait(() => this.#storage.delete(...args));
  }

  discardLeftovers(...args: Parameters<Storage["discardLeftovers"]>): Promise<number> {
    return this.#departure.wait(() => this.#storage.discardLeftovers(...args));
  }

  async *#each<T>(items: AsyncIterable<T>): AsyncGenerator<T> {
    const iterator = items[Symbol.asyncIterator]();
    let isWhole = false;
    try {
      for (;;) {
        const next = await this.#departure.wait(() => iterator.next());
        if (next.done === true) {
          isWhole = true;
          return;
        }
        yield next.value;
      }
    } finally {
      // One that hangs would not end either.
      if (!isWhole) void iterator.return?.().catch(() => undefined);
    }
  }
}
