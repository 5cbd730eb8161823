import type { Stats } from "node:fs";
import { link, lstat, open, rename, rm, type FileHandle } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { BusyError, TidemarkError, UsageError } from "../../errors/index.js";
import { isLocked } from "./file-lock.js";
import { partialName, removeAbandoned } from "./partial-name.js";

/** How an existing target is treated. */
export interface Overwrite {
  /** Replace a file that is there and not empty. */
  readonly force: boolean;
}

/**
 * A file that appears under its name only when it is whole: written beside it as
 * `.<name>.<owner>.tidemark-partial`, then renamed. A crash leaves a file that says by its name what it is; the next
 * restore to the same target takes it away.
 */
export class PartialFile {
  /** Where to write until then. */
  readonly path: string;
  readonly #final: string;
  /** What it replaces. */
  readonly #former: Stats | undefined;

  private constructor(path: string, final: string, former: Stats | undefined) {
    this.path = path;
    this.#final = final;
    this.#former = former;
  }

  /**
   * Checks that `target` may be written; creates nothing yet.
   *
   * @throws {UsageError} when it is there and not empty (and not forced), is no regular file, or has no directory
   * @throws {BusyError} when another process holds it open as a disk image
   */
  static async prepare(target: string, { force }: Overwrite): Promise<PartialFile> {
    const final = resolve(target);
    const directory = await lstat(dirname(final)).catch(noSuchFile);
    if (directory === undefined) {
      throw new UsageError(`Cannot restore to ${target}: the directory ${dirname(final)} does not exist`);
    }
    const found = await lstat(final).catch(noSuchFile);
    if (found !== undefined) {
      if (!found.isFile()) throw new UsageError(`Cannot restore to ${target}: it is not a regular file`);
      if (found.size > 0 && !force) {
        throw new UsageError(`Cannot restore to ${target}: it exists and is not empty`, {
          hint: "Choose another target, or give --force to replace it",
        });
      }
      await requireFree(target, final);
    }
    const name = await partialName(basename(final));
    return new PartialFile(join(dirname(final), name), final, found);
  }

  /** Creates the file, empty, and takes away what a restore to the same target left that was killed. */
  async create(): Promise<FileHandle> {
    await removeAbandoned(dirname(this.#final), basename(this.#final));
    const file = await open(this.path, "wx");
    if (this.#former !== undefined) await this.#resemble(file, this.#former);
    return file;
  }

  /** Gives it the former file's mode and, where this process may, owner: a machine has to be able to open it. */
  async #resemble(file: FileHandle, { uid, gid, mode }: Stats): Promise<void> {
    try {
      await file.chown(uid, gid).catch(notPermitted);
      await file.chmod(mode & 0o777);
    } catch (error) {
      await file.close();
      await this.remove();
      throw error;
    }
  }

  /**
   * Gives the finished, synced file its name.
   *
   * @throws {BusyError} when somebody has begun to use what it is to replace: he would go on with a file without a name
   */
  async commit(): Promise<void> {
    if (this.#former !== undefined) {
      if ((await lstat(this.#final).catch(noSuchFile)) !== undefined) await requireFree(this.#final);
      await rename(this.path, this.#final);
    } else {
      // link() fails where rename() would replace a file that somebody made meanwhile.
      try {
        await link(this.path, this.#final);
      } catch (error) {
        throw new TidemarkError(
          "TM_TARGET_EXISTS",
          `Cannot restore to ${this.#final}: it appeared meanwhile`,
          {
            cause: error,
          },
        );
      }
      await rm(this.path);
    }
    const directory = await open(dirname(this.#final), "r");
    try {
      await directory.sync();
    } finally {
      await directory.close();
    }
  }

  /** Removes what was written. */
  async remove(): Promise<void> {
    await rm(this.path, { force: true });
  }
}

/** @param target as the operator called it */
async function requireFree(target: string, path = target): Promise<void> {
  if (!(await isLocked(path))) return;
  throw new BusyError("TM_TARGET_BUSY", `Cannot restore to ${target}: another process has it locked`, {
    hint: "A machine seems to run on it; shut it down first",
  });
}

function notPermitted(error: NodeJS.ErrnoException): void {
  if (error.code !== "EPERM") throw error;
}

function noSuchFile(error: NodeJS.ErrnoException): undefined {
  if (error.code === "ENOENT") return undefined;
  throw error;
}
