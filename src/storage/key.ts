import { randomBytes } from "node:crypto";
import { StorageError } from "./failure.js";

/** S3 ends at 1024 bytes, file systems at 255 bytes for each segment. */
const MAX_KEY_BYTES = 1024;
const MAX_SEGMENT_BYTES = 255;

// Control characters and lone surrogates: no file name or URL carries them safely.
// eslint-disable-next-line no-control-regex
const FORBIDDEN = /[\u0000-\u001f\u007f]|\p{Surrogate}/u;

const LEFTOVER = /^\.tidemark-[0-9a-f]{16}\.partial$/;

/** Whether `text` may be a key: see the contract in storage.ts. */
export function isKey(text: string): boolean {
  return whyNotKey(text) === undefined;
}

/** Returns `key` if it may be one. @throws {StorageError} TM_STORAGE_KEY when it may not */
export function requireKey(key: string): string {
  const why = whyNotKey(key);
  if (why === undefined) return key;
  throw new StorageError("TM_STORAGE_KEY", `Cannot use ${JSON.stringify(key)} as a key: ${why}`);
}

/** Returns `prefix` if it is "" or a key followed by "/". @throws {StorageError} TM_STORAGE_KEY when not */
export function requirePrefix(prefix: string): string {
  if (prefix === "") return prefix;
  if (!prefix.endsWith("/")) {
    throw new StorageError("TM_STORAGE_KEY", `Cannot list ${JSON.stringify(prefix)}: it does not end in "/"`);
  }
  requireKey(prefix.slice(0, -1));
  return prefix;
}

/** A new name for a file that is being written: listings hide it, `discardLeftovers` finds it. */
export function newLeftoverName(): string {
  return `.tidemark-${randomBytes(8).toString("hex")}.partial`;
}

/** Whether a file of this name is one that a writer has not committed. */
export function isLeftoverName(name: string): boolean {
  return LEFTOVER.test(name);
}

function whyNotKey(text: string): string | undefined {
  if (Buffer.byteLength(text) > MAX_KEY_BYTES) return `it is longer than ${MAX_KEY_BYTES} bytes`;
  if (FORBIDDEN.test(text)) return "it holds control characters or broken Unicode";
  for (const segment of text.split("/")) {
    if (segment === "") return "a segment of it is empty";
    if (segment === "." || segment === "..") return `a segment of it is "${segment}"`;
    if (Buffer.byteLength(segment) > MAX_SEGMENT_BYTES)
      return `a segment of it is longer than ${MAX_SEGMENT_BYTES} bytes`;
    if (isLeftoverName(segment)) return "its name is reserved for files that are being written";
  }
  return undefined;
}
