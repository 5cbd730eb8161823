/**
 * Restore: from a point in a repository to a disk.
 *
 * - *target*: a new file (raw or qcow2), which appears when it is whole; a stream; or a disk that is there and is
 *   written *in place*: a block device, an NBD export, an image of which only what differs is changed.
 */
export {
  restore,
  type RestoreDisk,
  type RestoredDisk,
  type RestoreObserver,
  type RestoreOptions,
  type RestoreResult,
} from "./run.js";
export { TARGET_FORMATS, type TargetFormat, type TargetPlace } from "./target/open.js";
