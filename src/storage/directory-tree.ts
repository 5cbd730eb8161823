import type { Dirent, Stats } from "node:fs";
import { lstat, readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import type { IoOptions } from "../bytes/index.js";
import { walk } from "./directory.js";
import { failure, saysAbsent, StorageError } from "./failure.js";
import { isKey, requireKey, requirePrefix } from "./key.js";

/** A file found in a directory tree. */
export interface FoundFile {
  /** The file's name alone. */
  readonly name: string;
  readonly path: string;
  /** Relative to the root, with "/"; not always a valid key. */
  readonly key: string;
}

/** The directory tree behind a LocalStorage: from keys to paths that cannot leave it, and listings. */
export class DirectoryTree {
  readonly root: string;
  readonly #device: number;

  /**
   * @param root absolute, without symbolic links
   * @param device the root's `st_dev`, which tells an unmounted file system from an empty directory
   */
  constructor(root: string, device: number) {
    this.root = root;
    this.#device = device;
  }

  /** The path that a key stands for. */
  pathOf(key: string): string {
    return join(this.root, ...requireKey(key).split("/"));
  }

  /**
   * The directory that a key's file stands in, every segment of it checked not to be a link.
   *
   * @param create make it if it is missing
   * @throws the system's error; ENOENT or ENOTDIR when it is missing
   */
  directoryOf(key: string, create: boolean): Promise<string> {
    return walk(this.root, requireKey(key).split("/").slice(0, -1), create);
  }

  /** Regular files below a prefix, however deep. */
  async *files(prefix: string, options: IoOptions): AsyncGenerator<FoundFile> {
    for (const entry of await this.#entries(prefix, options)) {
      const key = prefix + entry.name;
      if (entry.isFile()) yield { name: entry.name, path: join(this.root, key), key };
      else if (entry.isDirectory() && isKey(key)) yield* this.files(`${key}/`, options);
    }
  }

  /** Names of the directories right below a prefix. */
  async folders(prefix: string, options: IoOptions): Promise<string[]> {
    const entries = await this.#entries(prefix, options);
    return entries.filter((entry) => entry.isDirectory() && isKey(entry.name)).map((entry) => entry.name);
  }

  /** Size and time of a file from a listing; undefined when it went away in between. */
  async statOf(file: FoundFile): Promise<Stats | undefined> {
    try {
      return await lstat(file.path);
    } catch (error) {
      if (saysAbsent(error)) return undefined;
      throw failure(`Cannot read the size of "${file.path}"`, error);
    }
  }

  /**
   * Makes sure that what looks absent is not merely out of sight: on an unmounted file system nothing is there.
   *
   * @throws {StorageError} TM_STORAGE_GONE
   */
  async requireRoot(): Promise<void> {
    const gone = (cause?: unknown): StorageError =>
      new StorageError("TM_STORAGE_GONE", `Cannot find directory "${this.root}" any more`, {
        cause,
        hint: "Was it removed, or its file system unmounted?",
      });
    const found = await stat(this.root).catch((error: unknown) => {
      throw saysAbsent(error) ? gone(error) : failure(`Cannot reach directory "${this.root}"`, error);
    });
    if (found.dev !== this.#device) throw gone();
  }

  async #entries(prefix: string, options: IoOptions): Promise<Dirent[]> {
    options.signal?.throwIfAborted();
    const segments = requirePrefix(prefix).split("/").slice(0, -1);
    await this.requireRoot();
    try {
      return await readdir(await walk(this.root, segments, false), { withFileTypes: true });
    } catch (error) {
      if (saysAbsent(error)) return [];
      throw failure(`Cannot list "${join(this.root, prefix)}"`, error);
    }
  }
}
