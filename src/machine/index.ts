/**
 * Machines: what is backed up, and how one point in time of it is frozen.
 *
 * - machine: one virtual machine; a *source* of frozen points, live in QEMU (or, later, its images alone).
 * - disk: a virtual disk that a device of the machine writes to.
 * - checkpoint: a point in time inside QEMU, on every disk one dirty bitmap that records all writes since.
 * - freeze: the one transaction that makes the checkpoint and the frozen point on all disks at once.
 * - frozen point: the disks' content at the freeze, readable over NBD until it is released.
 * - base: the bitmap that an increment takes its changes from.
 * - scratch: the local file that gets the old data of what the guest overwrites meanwhile.
 * - guard: a second process that ends the run if the first one dies.
 * - run: one invocation that works on a machine and has it locked; a dead one is cleaned up after.
 * - catalogue: how the repository answers for its points; it decides which bitmaps may go.
 */
export {
  baseContextOf,
  catalogueOf,
  checkpointsOf,
  type BaseContext,
  type Catalogue,
  type CataloguePoint,
  type Checkpoints,
  type PointSource,
} from "./checkpoints/catalogue.js";
export { chooseBase, chooseBases, type BaseChoice } from "./checkpoints/choose.js";
export {
  chooseComparisons,
  type ComparisonChoice,
  type ComparisonContext,
  type DiskDecision,
} from "./checkpoints/compare.js";
export {
  bitmapsToRemove,
  bitmapsToRemoveAfter,
  type RemovableBitmap,
  type RemovalContext,
} from "./checkpoints/remove.js";
export type { LiveDisk, RefusedDisk } from "./discover/discover.js";
export {
  ForeignServerError,
  GuardError,
  MachineBusyError,
  RunBusyError,
  ScratchFullError,
  SnapshotLostError,
  TeardownError,
  UnsupportedMachineError,
} from "./errors.js";
export { LiveMachine, openLiveMachine, type LiveMachineOptions, type NamedLiveDisk } from "./live.js";
export { recover, type LeftoverRun, type Leftovers, type RecoverOptions } from "./run/recover.js";
export { formatOf, type ImageFormat } from "./offline/offline-image.js";
export { ImageExport } from "./offline/image-export.js";
export { requireStorageDaemon, trackImage } from "./offline/track-image.js";
export { OfflineMachine, type ImageChoice, type OfflineMachineOptions } from "./offline/offline.js";
export { openMachine, type MachineChoice } from "./open.js";
export { nameDisks } from "./discover/naming.js";
export type { DiskChoice } from "./discover/select.js";
export type {
  BackingImage,
  FreezeBase,
  FreezeDisk,
  FreezeRequest,
  FrozenDisk,
  FrozenPoint,
  KeepOptions,
  MachineIdentity,
  MachineSource,
  QmpSource,
  MachineState,
  SourceBitmap,
  SourceDisk,
} from "./source.js";
