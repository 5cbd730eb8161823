/**
 * Verifying: whether all that a repository holds of a machine is what was stored, without restoring it.
 *
 * - problem: something that is not, and the points that cannot be restored because of it.
 * - quick: manifests, links, lengths, headers and tables; no data.
 */
export { verifyMachine, type VerifyObserver, type VerifyOptions, type VerifyReport } from "./run.js";
export type { Problem } from "./problem.js";
