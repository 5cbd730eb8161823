import { setMaxListeners } from "node:events";
import { InterruptedError, OutputError } from "./exit-code.js";

const ENDING = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/** What ends a command from outside. */
export interface OutsideEnd {
  /** The first signal: the command tears down in order. */
  readonly signal: AbortSignal;
  /** The second one: it does not wait any more for a repository that keeps silent. */
  readonly hurry: AbortSignal;
}

/**
 * One handler for all that ends a command from outside: a signal, or standard output that takes nothing more (its
 * reader has ended). What a machine needs to be unhurt is never hurried. Standard error that nobody reads ends nothing.
 */
export function abortFromOutside({ stdout, stderr }: Pick<NodeJS.Process, "stdout" | "stderr">): OutsideEnd {
  const first = new AbortController();
  const second = new AbortController();
  // As many may listen as there are requests in flight.
  for (const { signal } of [first, second]) setMaxListeners(0, signal);
  for (const name of ENDING) {
    process.on(name, () => {
      if (first.signal.aborted) second.abort();
      else first.abort(new InterruptedError(name));
    });
  }
  // Without a listener an error of a stream ends the process on the spot.
  stdout.on("error", (cause: Error) => first.abort(new OutputError(cause)));
  stderr.on("error", () => undefined);
  return { signal: first.signal, hurry: second.signal };
}

/** How long what is under way in the background may go on when an interrupted command has ended, in milliseconds. */
const LAST_WAIT = 2000;

/**
 * Sees to it that an interrupted process ends. One that waits in the kernel, for a network share whose server went
 * away, cannot even exit: it ends by the signal itself, which shells show as 130, too.
 */
export function endSoon(): void {
  const end = (): void => {
    process.removeAllListeners("SIGINT");
    process.kill(process.pid, "SIGINT");
  };
  setTimeout(end, LAST_WAIT).unref();
}
