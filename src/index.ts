/**
 * tidemark as a library: incremental backups of QEMU virtual machines as plain qcow2 chains.
 *
 * Protocols and formats have entries of their own: `tidemark/qmp`, `tidemark/nbd`, `tidemark/qcow2`,
 * `tidemark/storage`.
 *
 * @example
 * const repository = await openRepository(await LocalStorage.open("/backup"));
 * const point = await backup({
 *   repository,
 *   machine: "web",
 *   source: { kind: "live", address: parseQmpAddress("/run/vm/web.qmp"), runDirectory: "/run/tidemark" },
 *   tidemarkVersion: "my-product/1.0",
 * });
 */
export { backup, type BackupObserver, type BackupOptions } from "./backup/index.js";
export {
  BusyError,
  ConnectionError,
  DamageError,
  NotFoundError,
  ProtocolError,
  RequestError,
  TidemarkError,
  UsageError,
} from "./errors/index.js";
export { inspectMachine, type InspectOptions, type MachineStatus } from "./inspect/index.js";
export { parseQmpAddress, type QmpAddress } from "./qmp/index.js";
export {
  initRepository,
  openRepository,
  parsePointReference,
  selectPoint,
  type DiskManifest,
  type PointManifest,
  type Repository,
} from "./repository/index.js";
export { restore, type RestoreOptions, type RestoreResult } from "./restore/index.js";
export {
  compactPoints,
  deletePoint,
  editPoint,
  flattenPoint,
  prunePoints,
  type ChainChanges,
  type CompactOptions,
  type DeleteOptions,
  type EditOptions,
  type FlattenOptions,
  type PruneOptions,
  type RewriteObserver,
} from "./rewrite/index.js";
export { isEmptyPolicy, type RetentionPolicy } from "./retention/index.js";
export { servePoint, type PointServer, type ServeOptions } from "./serve/index.js";
export { LocalStorage, type Storage } from "./storage/index.js";
export { verifyMachine, type Problem, type VerifyOptions, type VerifyReport } from "./verify/index.js";
