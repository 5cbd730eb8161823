import { TidemarkError } from "../errors/index.js";

/** A wait took longer than its deadline. */
export class DeadlineError extends TidemarkError {
  constructor(what: string, milliseconds: number, hint?: string) {
    super("TM_DEADLINE", `${what}: no answer within ${milliseconds / 1000} s`, { hint });
  }
}

/**
 * Waits for `promise`, but no longer than `milliseconds`, nor past an abort of `signal`.
 * The promise itself is not cancelled: whoever made it must end it.
 *
 * @param what the action, for the message: "Connect to QMP socket /run/vm.qmp"
 * @throws {DeadlineError} when the time is over
 * @throws `signal.reason` when aborted
 */
export async function withDeadline<T>(
  promise: Promise<T>,
  milliseconds: number,
  what: string,
  options: { readonly signal?: AbortSignal | undefined; readonly hint?: string } = {},
): Promise<T> {
  const { signal, hint } = options;
  let timer: NodeJS.Timeout | undefined;
  let onAbort: (() => void) | undefined;
  try {
    return await new Promise<T>((resolve, reject) => {
      if (signal?.aborted) {
        reject(signal.reason as Error);
        return;
      }
      timer = setTimeout(() => reject(new DeadlineError(what, milliseconds, hint)), milliseconds);
      onAbort = () => reject(signal?.reason as Error);
      signal?.addEventListener("abort", onAbort, { once: true });
      promise.then(resolve, reject);
    });
  } finally {
    clearTimeout(timer);
    if (onAbort !== undefined) signal?.removeEventListener("abort", onAbort);
  }
}
