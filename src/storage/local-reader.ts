import type { FileHandle } from "node:fs/promises";
import type { ReadOptions } from "../bytes/index.js";
import { failure, ObjectReplacedError, saysAbsent, StorageError } from "./failure.js";
import { identityOf, isSameFile, openForReading, type FileIdentity, type OpenFiles } from "./open-files.js";
import type { ObjectReader } from "./storage.js";

/** What a reader remembers of the file that it opened. */
export interface PinnedFile {
  readonly key: string;
  readonly where: string;
  readonly path: string;
  readonly identity: FileIdentity;
}

/** Reads one object of a directory; between reads its file may be closed to make room for others. */
export class LocalReader implements ObjectReader {
  readonly length: number;
  readonly #file: PinnedFile;
  readonly #files: OpenFiles<PinnedFile>;
  #closed = false;

  constructor(file: PinnedFile, files: OpenFiles<PinnedFile>) {
    this.length = Number(file.identity.size);
    this.#file = file;
    this.#files = files;
  }

  async read(offset: number, length: number, options: ReadOptions = {}): Promise<Buffer> {
    options.signal?.throwIfAborted();
    const { key, where, path } = this.#file;
    const action = `Cannot read ${length} bytes at ${offset} of "${path}"`;
    if (this.#closed) throw new StorageError("TM_STORAGE_CLOSED", `${action}: the reader is closed`);
    if (!Number.isSafeInteger(offset) || offset < 0 || length < 0 || offset + length > this.length) {
      throw new StorageError("TM_STORAGE_RANGE", `${action}: it has ${this.length} bytes`);
    }
    try {
      const bytes = await this.#files.use(this.#file, (handle) =>
        readExactly(handle, offset, length, options.into),
      );
      if (bytes === undefined) throw new ObjectReplacedError(key, where, "it was cut short");
      return bytes;
    } catch (error) {
      throw failure(action, error);
    }
  }

  /** Runs `work` with the object's file, open. For what a path would not do: it may be another file's by now. */
  async use<T>(work: (handle: FileHandle) => Promise<T>): Promise<T> {
    return await this.#files.use(this.#file, work);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#files.close(this.#file);
  }
}

/** Opens a pinned file once more. @throws {ObjectReplacedError} when another one has taken its name */
export async function reopen(file: PinnedFile): Promise<FileHandle> {
  let handle: FileHandle;
  try {
    handle = await openForReading(file.path);
  } catch (error) {
    if (saysAbsent(error)) throw new ObjectReplacedError(file.key, file.where, "it was removed");
    throw error;
  }
  try {
    const found = identityOf(await handle.stat({ bigint: true }));
    if (isSameFile(found, file.identity)) return handle;
    throw new ObjectReplacedError(file.key, file.where, "it was replaced");
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/**
 * Reads `length` bytes; undefined when the file ends before.
 *
 * @param into memory to read into; default new memory, not from Node's shared pool: the caller may transfer it to another
 *   thread
 */
export async function readExactly(
  handle: FileHandle,
  offset: number,
  length: number,
  into?: Buffer,
): Promise<Buffer | undefined> {
  const buffer = into?.length === length ? into : Buffer.allocUnsafeSlow(length);
  for (let done = 0; done < length;) {
    const { bytesRead } = await handle.read(buffer, done, length - done, offset + done);
    if (bytesRead === 0) return undefined;
    done += bytesRead;
  }
  return buffer;
}
