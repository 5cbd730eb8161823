import { constants } from "node:fs";
import { chmod, copyFile, type FileHandle } from "node:fs/promises";
import { MiB, type IoOptions } from "../bytes/index.js";
import { systemCode } from "./failure.js";
import { LocalReader } from "./local-reader.js";
import type { CreateOptions, ObjectReader } from "./storage.js";

/** Bytes that are copied at a time where blocks cannot be shared. */
const PIECE = 4 * MiB;

const OWNER = 0o600;

/** What a file system says that shares no blocks between files, or not between these two. */
const CANNOT_SHARE: ReadonlySet<string> = new Set([
  "ENOTSUP",
  "EOPNOTSUPP",
  "EXDEV",
  "EINVAL",
  "ENOSYS",
  "ENOTTY",
  // ZFS, of what was written a moment ago.
  "EAGAIN",
]);

/** Bytes of a base. @throws {RangeError} when they are fewer than the head, or more than its object has */
export function requireBase(
  key: string,
  { object, length }: NonNullable<CreateOptions["base"]>,
  headLength: number,
): number {
  if (Number.isSafeInteger(length) && length >= headLength && length <= object.length) return length;
  throw new RangeError(`"${key}" cannot begin with ${length} bytes of an object of ${object.length}`);
}

/**
 * Makes a file that shares the blocks of a whole object, where the file system can do that.
 *
 * @param mode of the new file at most; its owner can read and write it
 * @returns whether it could; no file is there otherwise
 */
export async function shareBlocks(object: ObjectReader, path: string, mode: number): Promise<boolean> {
  if (!(object instanceof LocalReader)) return false;
  const { COPYFILE_EXCL, COPYFILE_FICLONE_FORCE } = constants;
  try {
    // By its descriptor: the object's name may have passed to another file.
    const from = await object.use(async (handle) => {
      await copyFile(`/proc/self/fd/${handle.fd}`, path, COPYFILE_EXCL | COPYFILE_FICLONE_FORCE);
      return await handle.stat();
    });
    // Nobody may read the copy who may not read the object, which was made under a umask.
    await chmod(path, (from.mode & mode) | OWNER);
    return true;
  } catch (error) {
    if (CANNOT_SHARE.has(systemCode(error) ?? "")) return false;
    throw error;
  }
}

/** Copies the first `length` bytes of an object into a file, piece by piece. */
export async function copyBytes(
  { object, length, pace }: NonNullable<CreateOptions["base"]>,
  file: FileHandle,
  { signal }: IoOptions,
): Promise<void> {
  for (let at = 0; at < length; at += PIECE) {
    signal?.throwIfAborted();
    await pace?.(Math.min(PIECE, length - at));
    const bytes = await object.read(at, Math.min(PIECE, length - at), { signal });
    for (let done = 0; done < bytes.length;) {
      done += (await file.write(bytes, done, bytes.length - done, at + done)).bytesWritten;
    }
  }
}
