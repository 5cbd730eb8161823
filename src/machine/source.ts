import type { IoOptions } from "../bytes/index.js";
import type { QmpClient } from "../qmp/index.js";
import type { MachinePlace } from "./run/run-record.js";
import type { Run } from "./run/run.js";

/** State of a machine at the time it was asked for. */
export type MachineState = "running" | "paused" | "shut off";

/** Who a machine is, and what would be needed to build it again. */
export interface MachineIdentity {
  readonly name: string | null;
  /** null when none was set (QEMU reports zeroes then). */
  readonly uuid: string | null;
  readonly state: MachineState;
  /** "7.2.22", with the distributor's name for the build where there is one. */
  readonly qemuVersion: string;
  /**
   * A migration took it away once, and it goes on here all the same. What its images hold is read anew then; a
   * bitmap that is not stored in one knows nothing of what was written elsewhere meanwhile.
   */
  readonly wasAway: boolean;
  /** Type, memory, processors, devices of the disks: captured for whoever rebuilds the machine. */
  readonly configuration: Readonly<Record<string, unknown>>;
}

/** A dirty bitmap that a disk carries, anybody's. */
export interface SourceBitmap {
  readonly name: string;
  /** The node that holds it: the disk's own, or one of its backing images (after an external snapshot). */
  readonly node: string;
  /** On a backing image or a read-only node: it neither records nor can be removed. */
  readonly readOnly: boolean;
  /** Bytes per bit. */
  readonly granularity: number;
  readonly recording: boolean;
  /** In use by an export or a job: it cannot be changed now. */
  readonly busy: boolean;
  readonly persistent: boolean;
  /** QEMU did not shut down cleanly: what it records is incomplete. */
  readonly inconsistent: boolean;
  readonly dirtyBytes: number;
}

/** One virtual disk of a machine, as it is now. */
export interface SourceDisk {
  /** The user's name for it, else `suggestedName`. Unique within the machine. */
  readonly name: string;
  /** Device id, else drive id, else `disk<N>`. */
  readonly suggestedName: string;
  /** `suggestedName` is only a position: it changes when drives are added. */
  readonly anonymous: boolean;
  /** Device id or QOM path, as evidence. */
  readonly qdev: string | null;
  readonly deviceId: string | null;
  readonly driveId: string | null;
  /** The top format node: it carries the bitmaps and is what a backup copies. */
  readonly node: string;
  /** Bytes. */
  readonly virtualSize: number;
  /** "qcow2", "raw", … */
  readonly format: string;
  /** Absolute path of the image's file; null when it is no plain file or its path cannot be known. */
  readonly imageFile: string | null;
  /** Whether the format stores bitmaps: checkpoints survive a clean restart of QEMU. */
  readonly canPersist: boolean;
  /** Bytes per cluster of the disk's own image; 0 for formats without clusters. */
  readonly imageClusterSize: number;
  /** Its own, then those of its backing images, from the top. */
  readonly bitmaps: readonly SourceBitmap[];
  /** The nodes below its own, nearest first. */
  readonly backing: readonly BackingImage[];
}

/** A node below a disk's own: an image that it was a snapshot of, or a filter on the way there. */
export interface BackingImage {
  readonly node: string;
  /** Bytes. */
  readonly virtualSize: number;
  /** As `SourceDisk.imageClusterSize`. */
  readonly imageClusterSize: number;
  /** It holds nothing itself. */
  readonly isFilter: boolean;
}

/** A bitmap to take changes from. */
export interface FreezeBase {
  readonly name: string;
  /** The node that holds it. */
  readonly node: string;
}

/** One disk of a freeze. */
export interface FreezeDisk {
  readonly disk: SourceDisk;
  /** The disk's token: ties the checkpoint's bitmap to the disk's chain. */
  readonly token: string;
  /** Absent for a full backup. */
  readonly base?: FreezeBase | undefined;
  /** Bytes per cluster of the images. */
  readonly clusterSize: number;
}

/** What to freeze, and with which means. */
export interface FreezeRequest {
  /** Id of the checkpoint, and of the point that is made from it. */
  readonly checkpoint: string;
  /** First 8 hex digits of the repository's id. */
  readonly repositoryTag: string;
  readonly disks: readonly FreezeDisk[];
  /** Where old data goes that the guest overwrites meanwhile; default beside each disk's image. */
  readonly scratchDirectory?: string | undefined;
  /** Bytes that all scratch files may take in all; default half of what is free there. */
  readonly scratchLimit?: number | undefined;
  /** Where the directory of the NBD socket is made; default beside the QMP socket, else the system's. */
  readonly socketDirectory?: string | undefined;
  /** NBD connections in all. */
  readonly maxConnections: number;
  /** Takes warnings for the user. */
  readonly warn?: ((message: string) => void) | undefined;
  /** Called just before the transaction; when it fails nothing is frozen and nothing is left. */
  readonly beforeFreeze?: (() => Promise<void>) | undefined;
  /** Called as soon as the point is frozen, before anything else is done: the guest may go on. */
  readonly onFrozen?: (() => Promise<void>) | undefined;
}

/** One disk of a frozen point, served over NBD. */
export interface FrozenDisk {
  readonly disk: SourceDisk;
  readonly token: string;
  /** Bytes, at the freeze. */
  readonly virtualSize: number;
  readonly socket: { readonly transport: "unix"; readonly path: string };
  readonly exportName: string;
  /** Meta context of what changed since the base; absent for a full backup. */
  readonly dirtyContext?: string | undefined;
  /**
   * Where the base is on a backing image: what lies above it has changed as well, which are the runs of
   * `qemu:allocation-depth` from 1 to this depth (the scratch being 1).
   */
  readonly overlayDepth?: number | undefined;
  /** Name of the checkpoint's bitmap, which records from the freeze on. */
  readonly bitmap: string;
}

/** All disks of a machine at one moment, until released. */
export interface FrozenPoint {
  readonly disks: readonly FrozenDisk[];
  readonly frozenAt: Date;
  /** State of the machine at the freeze. */
  readonly state: MachineState;
  /**
   * Fires when what is read may no longer be the frozen content: a scratch file reached its limit, a job
   * ended, QEMU went away; and when nothing protects the machine any more. Its reason is the error that the backup ends with.
   */
  readonly failed: AbortSignal;

  /**
   * Has NBD connections to the point protected against this process's death: another process gets duplicates, since
   * on some builds of QEMU a client that disconnects aborts the machine. To be called before anything is said on
   * them, and again, with all of them, when there are others. Does nothing where no guard is needed.
   *
   * @param descriptors file descriptors of this process
   * @throws {GuardError} when they cannot be protected, unless that was allowed
   */
  protect(descriptors: readonly number[]): Promise<void>;

  /**
   * Asks whether the point was intact until now. Must pass after the last read and before anything that was
   * read is trusted: the export of a cancelled job returns live data without a word.
   *
   * @throws {TidemarkError} TM_SNAPSHOT_LOST naming the disk
   */
  assertIntact(options?: IoOptions): Promise<void>;

  /**
   * Ends the frozen point in the order that is safe on every QEMU: exports are deleted first, then
   * `closeConnections` is called (it must close every NBD connection, negotiated or not), then jobs, scratch
   * and server go. Harmless when called twice, and when QEMU is gone. Cannot be aborted.
   *
   * @throws {TidemarkError} TM_TEARDOWN when something is left, naming what; the rest is done all the same
   */
  release(closeConnections: () => Promise<void>): Promise<void>;

  /** After the point was committed: removes the bases, or what is named, and the transient bitmaps of this freeze. */
  keep(options?: KeepOptions): Promise<void>;

  /**
   * After a failure: removes the transient bitmaps, and the checkpoint, whose point will never be. The bases record
   * on as if nothing had been.
   */
  drop(options?: DropOptions): Promise<void>;
}

/** Options of `FrozenPoint.drop`. */
export interface DropOptions {
  /** The point may have been committed all the same: the repository will decide about the checkpoint. */
  readonly keepCheckpoint?: boolean | undefined;
}

/** Options of `FrozenPoint.keep`. */
export interface KeepOptions {
  /** The bitmaps to remove in the place of the bases: what the catalogue rule lets go. */
  readonly remove?: readonly FreezeBase[] | undefined;
}

/** Where frozen points come from: a live machine, or the images of one that is off. */
export interface MachineSource {
  readonly identity: MachineIdentity;
  /** The disks that were selected, in QEMU's order. */
  readonly disks: readonly SourceDisk[];

  /**
   * Asks whether a freeze of these disks would be accepted now; changes nothing.
   *
   * @throws {BusyError} when another job, a migration or another run is in the way
   * @throws {TidemarkError} when a disk cannot be backed up at all, by its name
   */
  assertReady(options?: IoOptions): Promise<void>;

  /**
   * Asks whether anything in it may be changed now, a cleaning up included.
   *
   * @throws {BusyError} while it migrates, or when it has been migrated away: its images are another host's
   */
  assertHere(options?: IoOptions): Promise<void>;

  /** The machine as it is now: identity and disks read anew. */
  refresh(options?: IoOptions): Promise<void>;

  /** Freezes one point in time of the disks of the request. When it fails, nothing is left behind. */
  freeze(request: FreezeRequest, options?: IoOptions): Promise<FrozenPoint>;

  /** Lets go of the machine. Never throws. */
  close(): Promise<void>;
}

/** A source whose disks are in a QEMU process: all of them so far. What cleaning up works with. */
export interface QmpSource extends MachineSource {
  readonly qmp: QmpClient;
  readonly place: MachinePlace;
  /** Where runs keep their state and locks on this host. */
  readonly runDirectory: string;
  /** The run's id; undefined when the machine was opened to look only. */
  readonly runId: string | undefined;
  /** The run that has the machine's lock. @throws {UsageError} when the machine was opened to look only */
  assertWorking(): Run;
}
