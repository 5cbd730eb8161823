import { constants } from "node:fs";
import { link, open, rename, stat, unlink, type FileHandle } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { HeadLastSink } from "../bytes/index.js";
import { copyBytes, requireBase, shareBlocks } from "./base.js";
import { pruneEmpty, syncDirectory } from "./directory.js";
import { failure, StorageError, systemCode } from "./failure.js";
import { newLeftoverName } from "./key.js";
import type { CreateOptions } from "./storage.js";

/** Disks' contents are nobody else's business: the owner, and the group where the umask lets it read. */
const FILE_MODE = 0o640;
const REWRITE = constants.O_WRONLY | constants.O_NOFOLLOW;
const WRITE = REWRITE | constants.O_CREAT | constants.O_EXCL;

/**
 * Writes one object of a directory: into a file beside the target, under a name that listings hide, which takes
 * the target's name in one step once everything is on the disk.
 */
export class ObjectWriter implements HeadLastSink {
  readonly #root: string;
  readonly #target: string;
  readonly #path: string;
  readonly #handle: FileHandle;
  readonly #headLength: number;
  readonly #signal: AbortSignal | undefined;
  readonly #inFlight = new Set<Promise<void>>();
  #position: number;
  #state: "open" | "closed" = "open";

  private constructor(
    root: string,
    target: string,
    path: string,
    handle: FileHandle,
    options: CreateOptions,
  ) {
    this.#root = root;
    this.#target = target;
    this.#path = path;
    this.#handle = handle;
    this.#headLength = options.headLength;
    this.#position = options.base?.length ?? options.headLength;
    this.#signal = options.signal;
  }

  /**
   * @param root of the storage: it stays, however empty
   * @param target path of the object; its directory exists
   * @throws the system's error
   */
  static async open(root: string, target: string, options: CreateOptions): Promise<ObjectWriter> {
    const path = join(dirname(target), newLeftoverName());
    const { base, headLength } = options;
    if (base === undefined) {
      return new ObjectWriter(root, target, path, await open(path, WRITE, FILE_MODE), options);
    }
    requireBase(target, base, headLength);
    const isShared = await shareBlocks(base.object, path, FILE_MODE);
    const handle = await open(path, isShared ? REWRITE : WRITE, FILE_MODE);
    const writer = new ObjectWriter(root, target, path, handle, options);
    try {
      if (isShared) await handle.truncate(base.length);
      else await copyBytes(base, handle, options);
      return writer;
    } catch (error) {
      await writer.abort();
      throw error;
    }
  }

  async append(bytes: Uint8Array): Promise<void> {
    this.#signal?.throwIfAborted();
    this.#requireOpen();
    const at = this.#position;
    this.#position += bytes.length;
    const writing = this.#write(bytes, at);
    this.#inFlight.add(writing);
    try {
      await writing;
    } finally {
      this.#inFlight.delete(writing);
    }
  }

  async commit(head: Uint8Array): Promise<void> {
    await this.#finish(head);
    try {
      await rename(this.#path, this.#target);
      await syncDirectory(dirname(this.#target));
    } catch (error) {
      await this.#unlink();
      throw failure(`Cannot commit "${this.#target}"`, error);
    }
  }

  /** As `commit`, unless the target is there already. @returns whether it was committed */
  async commitIfAbsent(head: Uint8Array): Promise<boolean> {
    await this.#finish(head);
    try {
      const linked = await this.#link();
      await unlink(this.#path);
      if (linked) await syncDirectory(dirname(this.#target));
      return linked;
    } catch (error) {
      await this.#unlink();
      throw failure(`Cannot commit "${this.#target}"`, error);
    }
  }

  async abort(): Promise<void> {
    if (this.#state === "closed") return;
    this.#state = "closed";
    await Promise.allSettled(this.#inFlight);
    await this.#handle.close().catch(() => undefined);
    await this.#unlink();
  }

  async #finish(head: Uint8Array): Promise<void> {
    this.#signal?.throwIfAborted();
    this.#requireOpen();
    if (head.length !== this.#headLength) {
      throw new RangeError(`head of "${this.#target}" has ${head.length} bytes, not ${this.#headLength}`);
    }
    try {
      await Promise.all(this.#inFlight);
      await this.#write(head, 0);
      await this.#handle.sync();
      this.#signal?.throwIfAborted();
      // A network file system may report what it could not write only here.
      this.#state = "closed";
      await this.#handle.close();
    } catch (error) {
      this.#state = "open";
      await this.abort();
      throw failure(`Cannot write "${this.#target}"`, error);
    }
  }

  async #write(bytes: Uint8Array, at: number): Promise<void> {
    try {
      for (let done = 0; done < bytes.length;) {
        done += (await this.#handle.write(bytes, done, bytes.length - done, at + done)).bytesWritten;
      }
    } catch (error) {
      throw failure(`Cannot write "${this.#target}"`, error);
    }
  }

  async #link(): Promise<boolean> {
    try {
      await link(this.#path, this.#target);
      return true;
    } catch (error) {
      const code = systemCode(error);
      // NFS may repeat a call whose answer was lost and then find its own link there: the link count knows.
      if (code === "EEXIST") return (await stat(this.#path)).nlink > 1;
      if (code === "EPERM" || code === "ENOTSUP" || code === "ENOSYS" || code === "EOPNOTSUPP") {
        throw new StorageError(
          "TM_STORAGE_NO_LINKS",
          `Cannot commit "${this.#target}": its file system has no hard links`,
          {
            cause: error,
            hint: "Use a file system that has them (ext4, XFS, Btrfs, ZFS, NFS): they decide who is first",
          },
        );
      }
      throw error;
    }
  }

  /** Directories that nothing else is in go, too. What cannot be removed stays hidden, and a later run removes it. */
  async #unlink(): Promise<void> {
    await unlink(this.#path)
      .then(() => pruneEmpty(this.#root, dirname(this.#path)))
      .catch(() => undefined);
  }

  #requireOpen(): void {
    if (this.#state === "open") return;
    throw new StorageError("TM_STORAGE_CLOSED", `Cannot write "${this.#target}": it is committed or aborted`);
  }
}
