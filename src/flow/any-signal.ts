import { setMaxListeners } from "node:events";

/**
 * A signal that fires with the first of several; those that are undefined do not count. As many may listen as there
 * are requests in flight: that is no leak.
 */
export function anySignal(...signals: readonly (AbortSignal | undefined)[]): AbortSignal {
  const any = AbortSignal.any(signals.filter((signal) => signal !== undefined));
  setMaxListeners(0, any);
  return any;
}
