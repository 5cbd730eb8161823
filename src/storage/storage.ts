import type { ByteSource, HeadLastSink, IoOptions } from "../bytes/index.js";

/** An object opened for reading. */
export interface ObjectReader extends ByteSource {
  /** Frees what reading holds (a file, a connection). Never throws; reading afterwards is an error. */
  close(): Promise<void>;
}

/** One line of a listing. */
export interface ObjectEntry {
  readonly key: string;
  /** Bytes. */
  readonly size: number;
  /** When the object was committed, by the storage's clock. */
  readonly modified: Date;
}

export interface CreateOptions extends IoOptions {
  /** Bytes at the object's beginning that come last, in `commit`. */
  readonly headLength: number;
  /**
   * What the object begins with: a copy of the first `length` bytes of another one, no fewer than `headLength`. Where the
   * storage can, they are not moved through this process, or not at all: a file system that shares blocks
   * between files, a bucket that copies by itself. The first `append` lands behind them. `pace` is asked, and waited
   * for, before bytes are moved through this process after all.
   */
  readonly base?:
    | {
        readonly object: ObjectReader;
        readonly length: number;
        readonly pace?: ((bytes: number) => Promise<void>) | undefined;
      }
    | undefined;
}

export interface PutOptions extends IoOptions {
  /** Write only if no object is there under the key. */
  readonly ifAbsent?: boolean;
}

/**
 * The contract, which every implementation keeps and `test/contract/storage.test.ts` checks:
 *
 * **Keys** are relative, with "/" between segments, none of which is empty, "." or ".."; see `isKey`. A *prefix*
 * is "" or a key followed by "/". A hostile key is refused before anything is touched, and nothing
 * outside of the storage's root can be reached, through symbolic links neither.
 *
 * **Atomic commit.** An object becomes visible in one step, complete: after `put`, or after the `commit` of what
 * `create` returned. Readers see the old object or the new one, never a mixture and never a part. A writer
 * that aborts, or dies, leaves nothing visible.
 *
 * **Durability.** When `put`, `commit` or `delete` has resolved, its effect outlives a power failure. When one of them
 * rejects after it began to commit, the effect may or may not have happened: read to find out.
 *
 * **Read after write.** What has been committed is seen by every later `open`, `get` and listing, whoever asks.
 *
 * **One winner.** Of concurrent `put`s with `ifAbsent` to one key exactly one returns true.
 *
 * **Pinned readers.** An `ObjectReader` serves the bytes of the object that it opened. When the object was replaced
 * or deleted meanwhile it goes on with the old bytes or fails with ObjectReplacedError; it never mixes.
 *
 * **Absence is a fact.** ObjectNotFoundError means that the object is definitely not there. What
 * could not be found out (I/O errors, missing rights, a storage gone away) is another error, always.
 */
export interface Storage {
  /** Where this is, for messages: a directory, a bucket. */
  readonly description: string;

  /**
   * Begins an object that is written front to back, its head last. An object already there under the key
   * stays as it is until the commit replaces it.
   *
   * @throws {StorageError} e.g. when the storage is full, read-only, or refuses
   */
  create(key: string, options: CreateOptions): Promise<HeadLastSink>;

  /** Opens an object for reading. @throws {ObjectNotFoundError} when it is definitely not there */
  open(key: string, options?: IoOptions): Promise<ObjectReader>;

  /**
   * Reads a small object whole.
   *
   * @param options `maxLength`: bytes; a longer object is not read
   * @throws {ObjectNotFoundError} when it is definitely not there
   * @throws {ObjectTooLargeError} when it is longer than `maxLength`
   */
  get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer>;

  /**
   * Writes a small object whole.
   *
   * @returns whether it was written: false only with `ifAbsent`, when an object was there already
   */
  put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean>;

  /** All objects below a prefix, however deep, in no promised order. A missing folder is an empty one. */
  list(prefix: string, options?: IoOptions): AsyncIterable<ObjectEntry>;

  /**
   * Names of the folders directly below a prefix, in no promised order. A folder is one that holds an object or
   * a leftover, at any depth; an empty one may show, or not.
   */
  listFolders(prefix: string, options?: IoOptions): AsyncIterable<string>;

  /** Removes an object. One that is not there is fine. */
  delete(key: string, options?: IoOptions): Promise<void>;

  /**
   * Removes leftovers below a prefix, however deep. A writer that is still at work there will fail to
   * commit: call it only for folders that nobody else writes to, or with `before`.
   *
   * @param options `before`: only leftovers that were last written to before this time, by the storage's clock
   * @returns how many were removed
   */
  discardLeftovers(prefix: string, options?: IoOptions & { readonly before?: Date }): Promise<number>;
}
