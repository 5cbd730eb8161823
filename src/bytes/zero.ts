import { KiB } from "./units.js";

const ZEROES = Buffer.alloc(64 * KiB);

/** Whether all bytes are zero. Compares with a zero page, which is as fast as memory. */
export function isZero(bytes: Uint8Array): boolean {
  for (let at = 0; at < bytes.length; at += ZEROES.length) {
    const end = Math.min(at + ZEROES.length, bytes.length);
    if (ZEROES.compare(bytes, at, end, 0, end - at) !== 0) return false;
  }
  return true;
}
