import { setMaxListeners } from "node:events";
import { InterruptedError, OutputError } from "./exit-code.js";

const ENDING = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/**
 * One handler for all that ends a command from outside: a signal, or standard output that takes nothing more (its
 * reader has ended). The first aborts the returned signal, and the command tears down in order. A later one changes
 * nothing, since a hurried teardown could hurt the machine. Standard error that nobody reads ends nothing.
 */
export function abortFromOutside({ stdout, stderr }: Pick<NodeJS.Process, "stdout" | "stderr">): AbortSignal {
  const controller = new AbortController();
  // As many may listen as there are requests in flight.
  setMaxListeners(0, controller.signal);
  for (const name of ENDING) process.on(name, () => controller.abort(new InterruptedError(name)));
  // Without a listener an error of a stream ends the process on the spot.
  stdout.on("error", (cause: Error) => controller.abort(new OutputError(cause)));
  stderr.on("error", () => undefined);
  return controller.signal;
}
