/* eslint-disable @typescript-eslint/require-await -- the face is asynchronous, memory is not */
import type { HeadLastSink, IoOptions } from "../bytes/index.js";
import { ObjectNotFoundError, ObjectTooLargeError, StorageError } from "./failure.js";
import { requireBase } from "./base.js";
import { requireKey, requirePrefix } from "./key.js";
import type { CreateOptions, ObjectEntry, ObjectReader, PutOptions, Storage } from "./storage.js";

interface StoredObject {
  readonly bytes: Buffer;
  readonly modified: Date;
}

/** Storage in this process's memory, for tests and trials. It keeps the contract, but for durability. */
export class MemoryStorage implements Storage {
  readonly description = "memory";
  readonly #objects = new Map<string, StoredObject>();

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    options.signal?.throwIfAborted();
    requireKey(key);
    const { base, headLength } = options;
    const begun =
      base === undefined ? undefined : await base.object.read(0, requireBase(key, base, headLength));
    return new MemoryWriter(key, options, begun?.subarray(headLength), (bytes) => {
      this.#store(key, bytes);
    });
  }

  async open(key: string, options: IoOptions = {}): Promise<ObjectReader> {
    return new MemoryReader(key, this.#find(key, options).bytes);
  }

  async get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    const { bytes } = this.#find(key, options);
    if (bytes.length > options.maxLength)
      throw new ObjectTooLargeError(key, this.description, bytes.length, options.maxLength);
    return Buffer.from(bytes);
  }

  async put(key: string, bytes: Uint8Array, options: PutOptions = {}): Promise<boolean> {
    options.signal?.throwIfAborted();
    requireKey(key);
    if (options.ifAbsent === true && this.#objects.has(key)) return false;
    this.#store(key, Buffer.from(bytes));
    return true;
  }

  async *list(prefix: string, options: IoOptions = {}): AsyncGenerator<ObjectEntry> {
    requirePrefix(prefix);
    for (const [key, { bytes, modified }] of this.#objects) {
      options.signal?.throwIfAborted();
      if (key.startsWith(prefix)) yield { key, size: bytes.length, modified };
    }
  }

  async *listFolders(prefix: string, options: IoOptions = {}): AsyncGenerator<string> {
    requirePrefix(prefix);
    options.signal?.throwIfAborted();
    const below = [...this.#objects.keys()].filter((key) => key.startsWith(prefix));
    const segments = below.map((key) => key.slice(prefix.length).split("/"));
    yield* new Set(segments.flatMap(([first, ...rest]) => (rest.length > 0 ? [first ?? ""] : [])));
  }

  async delete(key: string, options: IoOptions = {}): Promise<void> {
    options.signal?.throwIfAborted();
    this.#objects.delete(requireKey(key));
  }

  async discardLeftovers(prefix: string, options: IoOptions = {}): Promise<number> {
    options.signal?.throwIfAborted();
    requirePrefix(prefix);
    return 0;
  }

  #find(key: string, options: IoOptions): StoredObject {
    options.signal?.throwIfAborted();
    const found = this.#objects.get(requireKey(key));
    if (found === undefined) throw new ObjectNotFoundError(key, this.description);
    return found;
  }

  #store(key: string, bytes: Buffer): void {
    this.#objects.set(key, { bytes, modified: new Date() });
  }
}

class MemoryReader implements ObjectReader {
  readonly length: number;
  readonly #key: string;
  #bytes: Buffer | undefined;

  constructor(key: string, bytes: Buffer) {
    this.length = bytes.length;
    this.#key = key;
    this.#bytes = bytes;
  }

  async read(offset: number, length: number, options: IoOptions = {}): Promise<Buffer> {
    options.signal?.throwIfAborted();
    const action = `Cannot read ${length} bytes at ${offset} of "${this.#key}"`;
    if (this.#bytes === undefined)
      throw new StorageError("TM_STORAGE_CLOSED", `${action}: the reader is closed`);
    if (!Number.isSafeInteger(offset) || offset < 0 || length < 0 || offset + length > this.length)
      throw new StorageError("TM_STORAGE_RANGE", `${action}: it has ${this.length} bytes`);
    return Buffer.from(this.#bytes.subarray(offset, offset + length));
  }

  async close(): Promise<void> {
    this.#bytes = undefined;
  }
}

class MemoryWriter implements HeadLastSink {
  readonly #key: string;
  readonly #headLength: number;
  readonly #signal: AbortSignal | undefined;
  readonly #store: (bytes: Buffer) => void;
  #parts: Buffer[] | undefined;

  constructor(
    key: string,
    options: CreateOptions,
    begun: Buffer | undefined,
    store: (bytes: Buffer) => void,
  ) {
    this.#parts = begun === undefined ? [] : [begun];
    this.#key = key;
    this.#headLength = options.headLength;
    this.#signal = options.signal;
    this.#store = store;
  }

  async append(bytes: Uint8Array): Promise<void> {
    this.#requireOpen().push(Buffer.from(bytes));
  }

  async commit(head: Uint8Array): Promise<void> {
    const parts = this.#requireOpen();
    if (head.length !== this.#headLength)
      throw new RangeError(`head of "${this.#key}" has ${head.length} bytes, not ${this.#headLength}`);
    this.#parts = undefined;
    this.#store(Buffer.concat([head, ...parts]));
  }

  async abort(): Promise<void> {
    this.#parts = undefined;
  }

  #requireOpen(): Buffer[] {
    this.#signal?.throwIfAborted();
    if (this.#parts !== undefined) return this.#parts;
    throw new StorageError("TM_STORAGE_CLOSED", `Cannot write "${this.#key}": it is committed or aborted`);
  }
}
