/** Flow: small tools for asynchronous work: deadlines, bounds on what is in flight, rates. */
export { anySignal } from "./any-signal.js";
export { Budget } from "./budget.js";
export { DeadlineError, withDeadline } from "./deadline.js";
export { deferred, type Deferred } from "./deferred.js";
export { pause } from "./pause.js";
export { RateLimit } from "./rate-limit.js";
export { step, type BackupStep, type StepName } from "./step.js";
export { unlessAborted } from "./unless-aborted.js";
