import { DeadlineError, withDeadline } from "../flow/index.js";
import { NbdConnectionError } from "./errors.js";

/** How long something on a connection may take, and what ends it. */
export interface Limits {
  /** "Cannot connect to NBD server unix:/run/vm.sock" */
  readonly what: string;
  readonly timeoutMs: number;
  readonly signal: AbortSignal | undefined;
  /** Ends the connection when the time is over, the signal aborts, or the work fails. */
  readonly end: (reason: Error) => void;
}

/**
 * Waits for `work` within its limits; whatever fails it also ends the connection.
 *
 * @throws {NbdConnectionError} TM_NBD_TIMEOUT when the time is over
 * @throws `signal.reason` when aborted
 */
export async function withLimits<T>(work: Promise<T>, limits: Limits): Promise<T> {
  const { what, timeoutMs, signal } = limits;
  // What the end of the connection does to `work` is of no interest once a limit has ended it.
  work.catch(() => undefined);
  try {
    return await withDeadline(work, timeoutMs, what, { signal });
  } catch (error) {
    const reason = error instanceof DeadlineError ? timeoutOf(what, timeoutMs, error) : error;
    limits.end(reason instanceof Error ? reason : new Error(String(reason)));
    throw reason;
  }
}

function timeoutOf(what: string, timeoutMs: number, cause: Error): NbdConnectionError {
  return new NbdConnectionError("TM_NBD_TIMEOUT", `${what}: no answer within ${timeoutMs / 1000} s`, {
    cause,
    hint: "The server may be stopped, or serve as many connections as it is allowed to",
  });
}
