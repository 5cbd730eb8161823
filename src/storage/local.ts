import { realpath, stat, unlink, type FileHandle } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import type { HeadLastSink, IoOptions } from "../bytes/index.js";
import { NotFoundError } from "../errors/index.js";
import { makeDirectories, pruneEmpty, syncDirectory } from "./directory.js";
import { DirectoryTree } from "./directory-tree.js";
import {
  failure,
  ObjectNotFoundError,
  ObjectReplacedError,
  ObjectTooLargeError,
  saysAbsent,
  StorageError,
  systemCode,
} from "./failure.js";
import { isKey, isLeftoverName, requirePrefix } from "./key.js";
import { LocalReader, readExactly, reopen, type PinnedFile } from "./local-reader.js";
import { ObjectWriter } from "./object-writer.js";
import { identityOf, openForReading, OpenFiles } from "./open-files.js";
import type { CreateOptions, ObjectEntry, ObjectReader, PutOptions, Storage } from "./storage.js";

export interface LocalStorageOptions extends IoOptions {
  /** Make the directory if it is missing. */
  readonly create?: boolean;
  /** Files that readers keep open at most while they do not read; 256 by default. */
  readonly openFiles?: number;
}

/** Enough for every image of a usual chain, which a restore reads in turns; few beside the 1024 that a process may open. */
const OPEN_FILES = 256;

/** How often a directory is made that another run, removing empty ones, takes away again in between. */
const DIRECTORY_ATTEMPTS = 8;

/** Storage in a directory: one file for each object. See the contract in storage.ts. */
export class LocalStorage implements Storage {
  /** The directory, absolute, without symbolic links. */
  readonly directory: string;
  readonly description: string;
  readonly #tree: DirectoryTree;
  readonly #readers: OpenFiles<PinnedFile>;

  private constructor(tree: DirectoryTree, openFiles: number) {
    this.directory = tree.root;
    this.description = `directory "${tree.root}"`;
    this.#tree = tree;
    this.#readers = new OpenFiles(openFiles, reopen);
  }

  /**
   * @param directory the storage's root; it may itself be reached through symbolic links
   * @throws {NotFoundError} TM_STORAGE_NOT_FOUND when it is not there and `create` is not set
   */
  static async open(directory: string, options: LocalStorageOptions = {}): Promise<LocalStorage> {
    options.signal?.throwIfAborted();
    const action = `Cannot open directory "${resolve(directory)}"`;
    try {
      if (options.create === true) await makeDirectories(resolve(directory));
      const root = await realpath(directory);
      const found = await stat(root);
      if (!found.isDirectory()) throw new StorageError("TM_STORAGE_IO", `${action}: it is not a directory`);
      return new LocalStorage(new DirectoryTree(root, found.dev), options.openFiles ?? OPEN_FILES);
    } catch (error) {
      if (!saysAbsent(error) || options.create === true) throw failure(action, error);
      throw new NotFoundError("TM_STORAGE_NOT_FOUND", `${action}: it does not exist`, {
        cause: error,
        hint: "Check the path, and that its file system is mounted; `tidemark init` makes a new repository",
      });
    }
  }

  async create(key: string, options: CreateOptions): Promise<HeadLastSink> {
    return this.#begin(key, options);
  }

  async put(key: string, bytes: Uint8Array, options: PutOptions = {}): Promise<boolean> {
    const writer = await this.#begin(key, { headLength: bytes.length, signal: options.signal });
    if (options.ifAbsent === true) return writer.commitIfAbsent(bytes);
    await writer.commit(bytes);
    return true;
  }

  async open(key: string, options: IoOptions = {}): Promise<ObjectReader> {
    const { path, handle } = await this.#openFile(key, options);
    try {
      const identity = identityOf(await handle.stat({ bigint: true }));
      const file: PinnedFile = { key, where: this.description, path, identity };
      await this.#readers.adopt(file, handle);
      return new LocalReader(file, this.#readers);
    } catch (error) {
      await handle.close();
      throw failure(`Cannot open "${path}"`, error);
    }
  }

  async get(key: string, options: IoOptions & { readonly maxLength: number }): Promise<Buffer> {
    const { path, handle } = await this.#openFile(key, options);
    try {
      const { size } = await handle.stat();
      if (size > options.maxLength)
        throw new ObjectTooLargeError(key, this.description, size, options.maxLength);
      const bytes = await readExactly(handle, 0, size);
      if (bytes === undefined) throw new ObjectReplacedError(key, this.description, "it was cut short");
      return bytes;
    } catch (error) {
      throw failure(`Cannot read "${path}"`, error);
    } finally {
      await handle.close();
    }
  }

  async *list(prefix: string, options: IoOptions = {}): AsyncGenerator<ObjectEntry> {
    for await (const file of this.#tree.files(requirePrefix(prefix), options)) {
      if (!isKey(file.key)) continue;
      const found = await this.#tree.statOf(file);
      if (found !== undefined) yield { key: file.key, size: found.size, modified: found.mtime };
    }
  }

  async *listFolders(prefix: string, options: IoOptions = {}): AsyncGenerator<string> {
    yield* await this.#tree.folders(prefix, options);
  }

  async delete(key: string, options: IoOptions = {}): Promise<void> {
    options.signal?.throwIfAborted();
    await this.#remove(this.#tree.pathOf(key), () => this.#tree.directoryOf(key, false));
  }

  async discardLeftovers(
    prefix: string,
    options: IoOptions & { readonly before?: Date } = {},
  ): Promise<number> {
    const before = options.before?.getTime() ?? Infinity;
    let removed = 0;
    for await (const file of this.#tree.files(requirePrefix(prefix), options)) {
      if (!isLeftoverName(file.name)) continue;
      const found = await this.#tree.statOf(file);
      if (found === undefined || found.mtimeMs >= before) continue;
      await this.#remove(file.path, () => Promise.resolve(dirname(file.path)));
      removed += 1;
    }
    return removed;
  }

  async #begin(key: string, options: CreateOptions): Promise<ObjectWriter> {
    options.signal?.throwIfAborted();
    const path = this.#tree.pathOf(key);
    await this.#tree.requireRoot();
    for (let attempt = 1; ; attempt += 1) {
      try {
        await this.#tree.directoryOf(key, true);
        return await ObjectWriter.open(this.#tree.root, path, options);
      } catch (error) {
        if (systemCode(error) !== "ENOENT" || attempt === DIRECTORY_ATTEMPTS)
          throw failure(`Cannot create "${path}"`, error);
      }
    }
  }

  async #openFile(key: string, options: IoOptions): Promise<{ path: string; handle: FileHandle }> {
    options.signal?.throwIfAborted();
    const path = this.#tree.pathOf(key);
    try {
      await this.#tree.directoryOf(key, false);
      const handle = await openForReading(path);
      if ((await handle.stat()).isFile()) return { path, handle };
      await handle.close();
    } catch (error) {
      if (!saysAbsent(error)) throw failure(`Cannot open "${path}"`, error);
      await this.#tree.requireRoot();
      throw new ObjectNotFoundError(key, this.description, { cause: error });
    }
    // A directory or a device is no object.
    throw new ObjectNotFoundError(key, this.description);
  }

  async #remove(path: string, directoryOf: () => Promise<string>): Promise<void> {
    try {
      const directory = await directoryOf();
      await unlink(path);
      await syncDirectory(directory);
    } catch (error) {
      // A directory of that name is no object: none is there.
      if (!saysAbsent(error) && systemCode(error) !== "EISDIR")
        throw failure(`Cannot delete "${path}"`, error);
      await this.#tree.requireRoot();
    }
    await pruneEmpty(this.#tree.root, dirname(path));
  }
}
