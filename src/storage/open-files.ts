import type { BigIntStats } from "node:fs";
import { constants } from "node:fs";
import { open, type FileHandle } from "node:fs/promises";

/** What tells one file from another that took its name: reused inodes differ in size or time. */
export interface FileIdentity {
  readonly dev: bigint;
  readonly ino: bigint;
  readonly size: bigint;
  readonly mtimeNs: bigint;
}

interface OpenFile {
  readonly handle: Promise<FileHandle>;
  users: number;
}

// No link is followed, and opening never waits (as it would on a FIFO that somebody put there).
const READ = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;

/** Opens a file for reading, never through a symbolic link. */
export function openForReading(path: string): Promise<FileHandle> {
  return open(path, READ);
}

/** The identity of an open file. */
export function identityOf(stats: BigIntStats): FileIdentity {
  return { dev: stats.dev, ino: stats.ino, size: stats.size, mtimeNs: stats.mtimeNs };
}

export function isSameFile(a: FileIdentity, b: FileIdentity): boolean {
  return a.dev === b.dev && a.ino === b.ino && a.size === b.size && a.mtimeNs === b.mtimeNs;
}

/**
 * Keeps files open between reads, but no more than `limit` of them idle: a chain may have thousands of
 * images, a process only so many files. A file that was closed to make room is opened again by its owner.
 */
export class OpenFiles<Owner extends object> {
  readonly #limit: number;
  readonly #open: (owner: Owner) => Promise<FileHandle>;
  /** Least recently used first. */
  readonly #files = new Map<Owner, OpenFile>();

  /** @param open opens an owner's file, and makes sure that it is still the right one */
  constructor(limit: number, open: (owner: Owner) => Promise<FileHandle>) {
    this.#limit = limit;
    this.#open = open;
  }

  /** How many files are open, or being opened. */
  get size(): number {
    return this.#files.size;
  }

  /** Runs `work` with the owner's file, which stays open until it ends. */
  async use<T>(owner: Owner, work: (handle: FileHandle) => Promise<T>): Promise<T> {
    const file = this.#files.get(owner) ?? { handle: this.#open(owner), users: 0 };
    file.handle.catch(() => undefined); // it may fail before room is made for it; who uses it awaits it below
    this.#files.delete(owner);
    this.#files.set(owner, file);
    file.users += 1;
    try {
      await this.#makeRoom();
      return await work(await file.handle);
    } catch (error) {
      // A file that could not be opened must not be kept as if it were open.
      if (this.#files.get(owner) === file && (await isRejected(file.handle))) this.#files.delete(owner);
      throw error;
    } finally {
      file.users -= 1;
    }
  }

  /** Takes over a file that is open already. */
  async adopt(owner: Owner, handle: FileHandle): Promise<void> {
    this.#files.set(owner, { handle: Promise.resolve(handle), users: 0 });
    await this.#makeRoom();
  }

  /** Closes the owner's file. Never throws: nothing was written to it. */
  async close(owner: Owner): Promise<void> {
    const file = this.#files.get(owner);
    this.#files.delete(owner);
    if (file !== undefined) await closeQuietly(file);
  }

  async #makeRoom(): Promise<void> {
    const closing: Promise<void>[] = [];
    for (const [owner, file] of this.#files) {
      if (this.#files.size <= this.#limit) break;
      if (file.users > 0) continue;
      this.#files.delete(owner);
      closing.push(closeQuietly(file));
    }
    await Promise.all(closing);
  }
}

function isRejected(promise: Promise<unknown>): Promise<boolean> {
  return promise.then(
    () => false,
    () => true,
  );
}

async function closeQuietly(file: OpenFile): Promise<void> {
  await file.handle.then((handle) => handle.close()).catch(() => undefined);
}
