import { setMaxListeners } from "node:events";
import { InterruptedError } from "./exit-code.js";

const ENDING = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

/**
 * One handler for all signals that end a command: the first aborts the returned signal, and the command tears
 * down in order. A later one changes nothing, since a hurried teardown could hurt the machine.
 */
export function abortOnSignals(): AbortSignal {
  const controller = new AbortController();
  // As many may listen as there are requests in flight.
  setMaxListeners(0, controller.signal);
  for (const name of ENDING) process.on(name, () => controller.abort(new InterruptedError(name)));
  return controller.signal;
}
