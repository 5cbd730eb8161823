import type { HeadLastSink } from "../../src/bytes/index.js";
import { deferred, type Deferred } from "../../src/flow/index.js";
import {
  StorageError,
  type ObjectEntry,
  type ObjectReader,
  type PutOptions,
  type Storage,
} from "../../src/storage/index.js";

/** What can be asked of a storage, of what it opened, and of what it is writing. */
export type StorageOperation =
  | "create"
  | "append"
  | "commit"
  | "abort"
  | "open"
  | "read"
  | "get"
  | "put"
  | "list"
  | "listFolders"
  | "delete"
  | "discardLeftovers";

/** What goes wrong, and when. */
export interface StorageFault {
  readonly operation: StorageOperation;
  /** Which of them, from 1. */
  readonly nth: number;
  /** Counted from when an object of such a key was put; default from the beginning. */
  readonly after?: RegExp | undefined;
  /**
   * `error`: nothing happens, an error is the answer. `lost answer`: it happens, an error is the answer.
   * `short`: half of the bytes are written, and all is said to be well. `hang`: it never answers, until it is freed.
   */
  readonly how: "error" | "lost answer" | "short" | "hang";
}

/** A fault in place. One that was to be injected and never was fails a test: look at `fired`. */
export interface ArmedFault {
  readonly fired: number;
  /** Resolves when it fires. */
  readonly firing: Promise<undefined>;
  /** Lets what hangs go on, with an error. */
  free(): void;
}

interface Armed extends StorageFault {
  left: number;
  isCounting: boolean;
  fired: number;
  readonly firing: Deferred<undefined>;
  readonly freed: Deferred<undefined>;
}

/** A storage in front of another one, that fails when it is told to. Counts what is asked of it. */
export class FaultyStorage implements Storage {
  readonly description: string;
  readonly #inner: Storage;
  readonly #before: (operation: StorageOperation, key: string) => Promise<void>;
  #counts = new Map<StorageOperation, number>();
  #armed: Armed | undefined;

  /** @param before called, and waited for, before everything that is asked */
  constructor(
    inner: Storage,
    before: (operation: StorageOperation, key: string) => Promise<void> = () => Promise.resolve(),
  ) {
    this.#inner = inner;
    this.#before = before;
    this.description = inner.description;
  }

  /** How often each operation was asked for, since the last call of this. */
  takeCounts(): ReadonlyMap<StorageOperation, number> {
    const counts = this.#counts;
    this.#counts = new Map();
    return counts;
  }

  /** Puts one fault in place, instead of the one before. */
  arm(fault: StorageFault): ArmedFault {
    const armed: Armed = {
      ...fault,
      left: fault.nth,
      isCounting: fault.after === undefined,
      fired: 0,
      firing: deferred(),
      freed: deferred(),
    };
    this.#armed = armed;
    return {
      get fired() {
        return armed.fired;
      },
      firing: armed.firing.promise,
      free: () => armed.freed.resolve(undefined),
    };
  }

  create(...args: Parameters<Storage["create"]>): Promise<HeadLastSink> {
    return this.#do("create", args[0], async () => this.#sink(args[0], await this.#inner.create(...args)));
  }

  open(...args: Parameters<Storage["open"]>): Promise<ObjectReader> {
    return this.#do("open", args[0], async () => this.#reader(args[0], await this.#inner.open(...args)));
  }

  get(...args: Parameters<Storage["get"]>): Promise<Buffer> {
    return this.#do("get", args[0], () => this.#inner.get(...args));
  }

  put(key: string, bytes: Uint8Array, ...rest: [options?: PutOptions]): Promise<boolean> {
    const short = (): Promise<boolean> => this.#inner.put(key, half(bytes), ...rest);
    return this.#do("put", key, () => this.#inner.put(key, bytes, ...rest), short);
  }

  async *list(...args: Parameters<Storage["list"]>): AsyncGenerator<ObjectEntry> {
    yield* await this.#do("list", args[0], () => Promise.resolve(this.#inner.list(...args)));
  }

  async *listFolders(...args: Parameters<Storage["listFolders"]>): AsyncGenerator<string> {
    yield* await this.#do("listFolders", args[0], () => Promise.resolve(this.#inner.listFolders(...args)));
  }

  delete(...args: Parameters<Storage["delete"]>): Promise<void> {
    return this.#do("delete", args[0], () => this.#inner.delete(...args));
  }

  discardLeftovers(...args: Parameters<Storage["discardLeftovers"]>): Promise<number> {
    return this.#do("discardLeftovers", args[0], () => this.#inner.discardLeftovers(...args));
  }

  #sink(key: string, sink: HeadLastSink): HeadLastSink {
    return {
      append: (bytes) =>
        this.#do(
          "append",
          key,
          () => sink.append(bytes),
          () => sink.append(half(bytes)),
        ),
      commit: (head) => this.#do("commit", key, () => sink.commit(head)),
      // By its contract it never throws.
      abort: async () => {
        await this.#do("abort", key, () => sink.abort()).catch(() => undefined);
      },
    };
  }

  #reader(key: string, reader: ObjectReader): ObjectReader {
    return {
      length: reader.length,
      read: (...args) => this.#do("read", key, () => reader.read(...args)),
      close: () => reader.close(),
    };
  }

  async #do<T>(
    operation: StorageOperation,
    key: string,
    act: () => Promise<T>,
    actShort: () => Promise<T> = act,
  ): Promise<T> {
    this.#counts.set(operation, (this.#counts.get(operation) ?? 0) + 1);
    await this.#before(operation, key);
    const fault = this.#armed;
    if (fault === undefined || !isHit(fault, operation, key)) return await act();
    fault.fired += 1;
    fault.firing.resolve(undefined);
    if (fault.how === "short") return await actShort();
    if (fault.how === "lost answer") await act();
    if (fault.how === "hang") await fault.freed.promise;
    const hint = "It was injected by the test";
    throw new StorageError("TM_STORAGE_IO", `Cannot ${operation} "${key}": injected fault`, { hint });
  }
}

/** Counts. @returns whether this is the one that fails */
function isHit(fault: Armed, operation: StorageOperation, key: string): boolean {
  if (!fault.isCounting) {
    fault.isCounting = operation === "put" && fault.after?.test(key) === true;
    return false;
  }
  if (fault.operation !== operation || fault.left === 0) return false;
  fault.left -= 1;
  return fault.left === 0;
}

function half(bytes: Uint8Array): Uint8Array {
  return bytes.subarray(0, bytes.length >> 1);
}
