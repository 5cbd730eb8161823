/** Restore: from a point in a repository to a disk: a file, or a stream. */
export {
  restore,
  type RestoreDisk,
  type RestoreObserver,
  type RestoreOptions,
  type RestoreResult,
} from "./run.js";
export { TARGET_FORMATS, type TargetFormat, type TargetPlace } from "./target/open.js";
