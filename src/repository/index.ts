/**
 * The repository: where points live, on any storage.
 *
 * - *manifest*: `point.json`, which says all about a point. A point exists when its manifest does.
 * - *image*: one disk of a point, full or incremental; *chain*: the images that make up a disk at a point.
 * - *reference*: a point as a user writes it, `MACHINE@POINT`.
 * - *lock*: held by the one run that changes a machine's points; *fence*: what keeps a run that lost it from committing.
 */
export type { Survey, UnreadablePoint } from "./catalogue.js";
export type { ChangeOptions } from "./change.js";
export type { CommitOptions } from "./commit.js";
export type { Comparison } from "./comparison.js";
export {
  ChainDamageError,
  FencedError,
  LockedError,
  ManifestDamageError,
  NewerFormatError,
  PointNeededError,
  PointImageDamageError,
} from "./errors.js";
export type { Collection } from "./garbage.js";
export { hashesFileOf, imageFileOf } from "./layout.js";
export { LOCK_TIMES, type LockTimes } from "./lock-contest.js";
export { MachineLock } from "./lock.js";
export {
  CONSISTENCIES,
  MACHINE_STATES,
  MANIFEST_FORMAT,
  storedBytesOf,
  type Consistency,
  type DiskManifest,
  type MachineState,
  type PendingImage,
  type PointManifest,
} from "./manifest.js";
export { PointChain } from "./point-chain.js";
export { PointHashes } from "./point-hashes.js";
export { PointImage } from "./point-image.js";
export { requirePointText, type PointText } from "./point-text.js";
export { REPOSITORY_FORMAT, type RepositoryFile } from "./repository-file.js";
export { initRepository, openRepository, Repository, type NewImage } from "./repository.js";
export { parsePointReference, selectPoint, type PointReference, type SelectablePoint } from "./selector.js";
export {
  childrenOf,
  currentPoint,
  dependentsOf,
  diskChain,
  pointChain,
  rootsOf,
  sortPoints,
  standingPoints,
  type PointNode,
} from "./tree.js";
