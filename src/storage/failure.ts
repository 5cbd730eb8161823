import { messageOf, NotFoundError, TidemarkError, type ErrorDetails } from "../errors/index.js";

export type StorageErrorCode =
  | "TM_STORAGE_IO"
  | "TM_STORAGE_FULL"
  | "TM_STORAGE_READ_ONLY"
  | "TM_STORAGE_DENIED"
  | "TM_STORAGE_GONE"
  | "TM_STORAGE_SYMLINK"
  | "TM_STORAGE_NO_LINKS"
  | "TM_STORAGE_KEY"
  | "TM_STORAGE_RANGE"
  | "TM_STORAGE_CLOSED"
  | "TM_OBJECT_REPLACED"
  | "TM_OBJECT_TOO_LARGE";

/** The storage failed, or refused. Nothing is said about whether the object is there. */
export class StorageError extends TidemarkError {
  // eslint-disable-next-line @typescript-eslint/no-useless-constructor -- narrows the type of code
  constructor(code: StorageErrorCode, message: string, details?: ErrorDetails) {
    super(code, message, details);
  }
}

/** The object is definitely not there. */
export class ObjectNotFoundError extends NotFoundError {
  constructor(key: string, where: string, details?: ErrorDetails) {
    super("TM_OBJECT_NOT_FOUND", `Cannot find "${key}" in ${where}`, details);
  }
}

/** The object that a reader opened is no longer the one that is stored. */
export class ObjectReplacedError extends StorageError {
  constructor(key: string, where: string, what: string) {
    super("TM_OBJECT_REPLACED", `Cannot go on reading "${key}" in ${where}: ${what} since it was opened`, {
      hint: "Another run changed the repository meanwhile: try again",
    });
  }
}

/** The object is longer than the caller is ready to read. */
export class ObjectTooLargeError extends StorageError {
  constructor(key: string, where: string, length: number, maxLength: number) {
    super(
      "TM_OBJECT_TOO_LARGE",
      `Cannot read "${key}" in ${where}: it has ${length} bytes, more than the ${maxLength} allowed`,
    );
  }
}

/** The error code of a failed system call; undefined for anything else. */
export function systemCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" && "syscall" in error
    ? error.code
    : undefined;
}

/** Whether a failed system call says that there is nothing of this name. */
export function saysAbsent(error: unknown): boolean {
  const code = systemCode(error);
  return code === "ENOENT" || code === "ENOTDIR";
}

const FAILURES: Readonly<Record<string, readonly [StorageErrorCode, reason: string, hint: string]>> = {
  ENOSPC: [
    "TM_STORAGE_FULL",
    "no space is left",
    "Free space on that file system, or delete points that are no longer needed",
  ],
  EDQUOT: [
    "TM_STORAGE_FULL",
    "the disk quota is used up",
    "Raise the quota, or delete points that are no longer needed",
  ],
  EFBIG: [
    "TM_STORAGE_FULL",
    "the file is larger than the file system or the limit (ulimit -f) allows",
    "Use a file system for large files, or raise the limit",
  ],
  EROFS: [
    "TM_STORAGE_READ_ONLY",
    "the file system is read-only",
    "Mount it writable; if it became read-only by itself, check its disk",
  ],
  EACCES: [
    "TM_STORAGE_DENIED",
    "permission is denied",
    "Run as a user who may read and write the repository, or change its owner",
  ],
  EPERM: [
    "TM_STORAGE_DENIED",
    "the operation is not permitted",
    "Run as a user who may read and write the repository, or change its owner",
  ],
  ELOOP: [
    "TM_STORAGE_SYMLINK",
    "it is a symbolic link",
    "Replace the link by what it points to: a repository holds no links",
  ],
  EMFILE: ["TM_STORAGE_IO", "too many files are open", "Raise the limit (ulimit -n)"],
  ENFILE: ["TM_STORAGE_IO", "too many files are open on this host", "Raise the limit (fs.file-max)"],
};

const IO_HINT = "Check that storage: its disk or network, its mount, and what the kernel has logged";

/**
 * The error for a failed system call. What is no system call's error (an abort's reason, one of ours) is
 * returned as it is.
 *
 * @param action what was tried, naming the path: `Cannot write "/backup/web/lock"`
 */
export function failure(action: string, error: unknown): Error {
  const code = systemCode(error);
  if (code === undefined) return error as Error;
  const [ours, reason, hint] = FAILURES[code] ?? (["TM_STORAGE_IO", messageOf(error), IO_HINT] as const);
  return new StorageError(ours, `${action}: ${reason}`, { cause: error, hint });
}
