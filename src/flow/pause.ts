import { setTimeout as sleep } from "node:timers/promises";

/** Waits. @throws `signal.reason` when aborted, not the timer's own AbortError */
export async function pause(milliseconds: number, signal?: AbortSignal): Promise<void> {
  try {
    await sleep(milliseconds, undefined, signal === undefined ? {} : { signal });
  } catch (error) {
    signal?.throwIfAborted();
    throw error;
  }
}
