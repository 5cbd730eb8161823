import { KiB, MiB } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import { NBD_MAX_STRING } from "./constants.js";
import type { TlsOptions } from "./tls-options.js";

/** Options of `negotiate`. */
export interface NegotiateOptions {
  readonly exportName: string;
  /**
   * Metadata contexts to select, by their full names. Those that the server lacks are silently left out:
   * see `client.export.contexts`. One per connection is best (see `NbdClient.blockStatus`).
   */
  readonly contexts?: readonly string[];
  /** Encrypt, by these means or not at all. Default: plain text. */
  readonly tls?: TlsOptions | undefined;
  /** Longest read or write request, 256 KiB (default) to 1 MiB; the export's maximum block size limits it further. */
  readonly requestSize?: number | undefined;
  /** How long one request may stay unanswered before the connection is given up. Default 30 seconds. */
  readonly requestTimeoutMs?: number | undefined;
  /** How long the handshake may take. Default 10 seconds. */
  readonly timeoutMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

export const DEFAULT_TIMEOUT_MS = 10_000;
export const DEFAULT_REQUEST_TIMEOUT_MS = 30_000;
export const MIN_REQUEST_SIZE = 256 * KiB;
const MAX_REQUEST_SIZE = 1 * MiB;

/** @param what for messages: `Cannot negotiate export "sda"`. @throws {UsageError} when an option is out of its bounds */
export function validateOptions(what: string, options: NegotiateOptions): void {
  const { exportName, contexts = [], requestSize = MIN_REQUEST_SIZE } = options;
  for (const name of [exportName, ...contexts]) {
    const length = Buffer.byteLength(name);
    if (length > NBD_MAX_STRING)
      throw new UsageError(`${what}: a name has ${length} bytes, at most ${NBD_MAX_STRING}`);
  }
  if (!(requestSize >= MIN_REQUEST_SIZE && requestSize <= MAX_REQUEST_SIZE)) {
    throw new UsageError(`${what}: requests of ${requestSize} bytes, 256 KiB to 1 MiB are allowed`);
  }
  for (const time of [options.timeoutMs, options.requestTimeoutMs]) {
    if (time !== undefined && !(time > 0)) throw new UsageError(`${what}: ${time} ms is not a time-out`);
  }
}
