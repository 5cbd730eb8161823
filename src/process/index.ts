/**
 * Process: which process this is, and whether another one, known by what it once wrote about itself, still runs. Locks
 * are taken over from dead processes by this, so what cannot be known is never guessed.
 */
export {
  thisHost,
  thisProcess,
  type HostIdentity,
  type ProcessIdentity,
  type ProcessOnHost,
} from "./identity.js";
export { judgeOnAnyHost, judgeOnThisHost, type Liveness } from "./liveness.js";
