/**
 * Storage: where a repository's bytes live. Nothing in it can seek or rename, so that a directory fits as
 * well as a bucket.
 *
 * - *object*: bytes under a key; it is there as a whole or not at all, and is replaced, never modified.
 * - *key*: a relative name with "/" between its segments; *folder*: what ends at a "/".
 * - *commit*: the one step in which an object becomes visible and durable.
 * - *leftover*: what a writer that never committed left behind; no listing shows it.
 */
export {
  ObjectNotFoundError,
  ObjectReplacedError,
  ObjectTooLargeError,
  StorageError,
  type StorageErrorCode,
} from "./failure.js";
export { makeDirectories } from "./directory.js";
export { interruptible, type InterruptibleOptions } from "./interruptible.js";
export { isKey, requireKey } from "./key.js";
export { LocalStorage, type LocalStorageOptions } from "./local.js";
export { MemoryStorage } from "./memory.js";
export type { CreateOptions, ObjectEntry, ObjectReader, PutOptions, Storage } from "./storage.js";
