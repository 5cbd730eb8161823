import { UsageError } from "../errors/index.js";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/** Whether `text` may name a machine or a disk. Such a name can never leave its folder. */
export function isName(text: string): boolean {
  return NAME.test(text);
}

/**
 * Returns `text` if it may name a machine or a disk.
 *
 * @param what "machine" or "disk", for the message
 * @throws {UsageError} when it may not
 */
export function requireName(what: "machine" | "disk", text: string): string {
  if (isName(text)) return text;
  throw new UsageError(`${JSON.stringify(text)} cannot be the name of a ${what}`, {
    hint: "Use 1 to 64 letters, digits, dots, underscores and hyphens, beginning with a letter or a digit",
  });
}
