import { constants } from "node:fs";
import { lstat, mkdir, open, rmdir } from "node:fs/promises";
import { dirname, join } from "node:path";
import { failure, StorageError, systemCode } from "./failure.js";

/** Disks' contents are nobody else's business: the owner, and the group where the umask lets it read. */
const DIRECTORY_MODE = 0o750;

/**
 * Walks from `root` down to a directory, one segment at a time, so that no symbolic link leads
 * outside. With `create`, segments that are missing are made, durably.
 *
 * @returns the directory's path
 * @throws the system's error ENOENT or ENOTDIR when a segment is missing
 * @throws {StorageError} TM_STORAGE_SYMLINK when a segment is a symbolic link
 */
export async function walk(root: string, segments: readonly string[], create: boolean): Promise<string> {
  let path = root;
  for (const segment of segments) {
    const parent = path;
    path = join(parent, segment);
    if (create) await makeDirectory(parent, path);
    const found = await lstat(path);
    if (found.isSymbolicLink()) {
      throw new StorageError("TM_STORAGE_SYMLINK", `Cannot use "${path}": it is a symbolic link`, {
        hint: "Replace the link by what it points to: a repository holds no links",
      });
    }
    if (!found.isDirectory()) throw notADirectory(path);
  }
  return path;
}

/**
 * Makes a directory, and those above it that are missing. (Node's own way never ends where a folder can be looked at, but
 * nothing be made in it, and the system says that it is not there: /proc.)
 *
 * @throws the system's error
 */
export async function makeDirectories(path: string, mode = DIRECTORY_MODE): Promise<void> {
  try {
    await mkdir(path, { mode });
    return;
  } catch (error) {
    const code = systemCode(error);
    // Whatever is there: whoever uses it will see what it is.
    if (code === "EEXIST") return;
    if (code !== "ENOENT" || dirname(path) === path) throw error;
  }
  await makeDirectories(dirname(path), mode);
  try {
    await mkdir(path, { mode });
  } catch (error) {
    if (systemCode(error) !== "EEXIST") throw error;
  }
}

/** Makes what a directory's entries say outlive a power failure. */
export async function syncDirectory(path: string): Promise<void> {
  const handle = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await handle.sync();
  } catch (error) {
    // Some network and FUSE file systems cannot sync a directory, having nothing to sync; they say so.
    const code = systemCode(error);
    if (code !== "EINVAL" && code !== "ENOTSUP" && code !== "ENOSYS") throw error;
  } finally {
    await handle.close();
  }
}

/** Removes empty directories from `path` upwards, ending below `root`. */
export async function pruneEmpty(root: string, path: string): Promise<void> {
  for (let directory = path; directory !== root; directory = dirname(directory)) {
    try {
      await rmdir(directory);
    } catch (error) {
      const code = systemCode(error);
      if (code === "ENOTEMPTY" || code === "EEXIST" || code === "EBUSY") return;
      if (code !== "ENOENT" && code !== "ENOTDIR")
        throw failure(`Cannot remove the empty directory "${directory}"`, error);
    }
  }
}

async function makeDirectory(parent: string, path: string): Promise<void> {
  try {
    await mkdir(path, { mode: DIRECTORY_MODE });
  } catch (error) {
    if (systemCode(error) === "EEXIST") return;
    throw error;
  }
  await syncDirectory(parent);
}

function notADirectory(path: string): Error {
  return Object.assign(new Error(`ENOTDIR: not a directory, '${path}'`), {
    code: "ENOTDIR",
    syscall: "lstat",
    path,
  });
}
