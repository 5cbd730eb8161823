import type { IoOptions } from "../../bytes/index.js";
import { NotFoundError } from "../../errors/index.js";
import type { QmpClient } from "../../qmp/index.js";
import { overlaysOn } from "../checkpoints/overlays.js";
import type { DiskNode, LiveDisk, RefusedDisk } from "./discover.js";
import { MachineBusyError, UnsupportedMachineError } from "../errors.js";
import { describeNames } from "./select.js";
import type { FreezeDisk } from "../source.js";

/**
 * Migration states of a machine that is here: "completed" is also said for ever of one that arrived by a migration, and
 * the run state tells that from one that has left.
 */
const NOT_MIGRATING = new Set(["none", "cancelled", "failed", "completed", undefined]);
/** Run states of a machine whose images are changing hands. */
const CHANGING = new Set(["inmigrate", "finish-migrate"]);

/**
 * What a freeze needs from QEMU; all of it is there since 5.2.
 *
 * @throws {UnsupportedMachineError} naming what is missing
 */
export async function assertFeatures(qmp: QmpClient, options: IoOptions = {}): Promise<void> {
  const schema = await qmp.schema(options);
  const action = (value: string) => ({ command: "transaction", argument: "actions.type", value });
  const needed = [
    { command: "block-export-add", argument: "bitmaps" },
    { command: "nbd-server-start", argument: "max-connections" },
    { command: "blockdev-create" },
    { command: "x-debug-query-block-graph" },
    ...[
      "block-dirty-bitmap-add",
      "block-dirty-bitmap-merge",
      "block-dirty-bitmap-remove",
      "blockdev-backup",
    ].map(action),
  ];
  const missing = needed.find((question) => !schema.has(question));
  if (missing === undefined) return;
  const { major, minor } = qmp.greeting.version;
  const what = Object.values(missing).join(" ");
  throw new UnsupportedMachineError(
    `Cannot back up a machine of QEMU ${major}.${minor}: it lacks "${what}"`,
    {
      hint: "QEMU 5.2 or newer is needed",
    },
  );
}

/** @throws {MachineBusyError} while the machine migrates, in or out, and when it has been migrated away */
export async function assertNotMigrating(qmp: QmpClient, options: IoOptions = {}): Promise<void> {
  const [{ status: migration }, status] = await Promise.all([
    qmp.execute("query-migrate", undefined, options),
    qmp.execute("query-status", undefined, options),
  ]);
  if (status === "postmigrate") {
    throw new MachineBusyError(
      "Cannot back up the machine: it has been migrated away (state postmigrate), its images are in use elsewhere",
      { hint: "Back it up where it runs now" },
    );
  }
  if (NOT_MIGRATING.has(migration) && !CHANGING.has(status)) return;
  throw new MachineBusyError(
    `Cannot back up the machine: it is migrating (migration ${migration ?? "none"}, state ${status})`,
    { hint: "Wait until the migration has ended, then back it up where it runs" },
  );
}

/**
 * @param refused those of the selection
 * @param allowThreaded whether disks in iothreads are accepted: there is a guard, or none is wanted
 * @throws {UnsupportedMachineError} when a disk cannot be backed up
 */
export function assertDisksSupported(
  disks: readonly LiveDisk[],
  refused: readonly RefusedDisk[],
  allowThreaded: boolean,
): void {
  const [first] = refused;
  if (first !== undefined) {
    throw new UnsupportedMachineError(`Cannot back up disk ${describeNames(first)}: ${first.reason}`, {
      hint: "Name the disks to back up with --disk, without this one",
    });
  }
  if (disks.length === 0) {
    throw new NotFoundError("TM_NO_DISK", "Cannot back up the machine: it has no writable disk", {
      hint: "Removable and read-only disks are never backed up",
    });
  }
  const threaded = disks.find(({ iothread }) => iothread !== null);
  if (threaded === undefined || allowThreaded) return;
  throw new UnsupportedMachineError(
    `Cannot back up disk ${describeNames(threaded)}: it is served by an iothread (${threaded.iothread ?? ""}), and on some builds of QEMU the death of the backup would then abort the machine`,
    { hint: "Use --allow-unguarded to take that risk" },
  );
}

/** @throws {MachineBusyError} when a job of another program works on a disk */
export function assertNoForeignJobs(disks: readonly LiveDisk[]): void {
  for (const disk of disks) {
    const [job] = disk.foreignJobs;
    if (job === undefined) continue;
    throw new MachineBusyError(
      `Cannot back up disk ${describeNames(disk)}: job "${job}" of another program works on it`,
      { hint: "Wait until the job has ended, or cancel it" },
    );
  }
}

/**
 * Asks whether the disks of a freeze are still what they were when they were looked at. A node that somebody put
 * a snapshot on top of can be frozen all the same, but shows the past: what the guest writes is above it.
 *
 * @param now the machine's disks, looked at when nobody can change them any more
 * @throws {MachineBusyError} when a disk was exchanged, resized, or its base does not record any more
 */
export function assertDisksUnchanged(wanted: readonly FreezeDisk[], now: readonly DiskNode[]): void {
  for (const { disk, base } of wanted) {
    const changed = (what: string): MachineBusyError =>
      new MachineBusyError(`Cannot freeze disk ${disk.name}: ${what}`, {
        hint: "Somebody else changes the machine's disks; run the backup again when that is over",
      });
    const found = now.find(({ node, qdev }) => node === disk.node && qdev === disk.qdev);
    if (found === undefined)
      throw changed(`its guest writes to another image than node "${disk.node}" by now`);
    if (found.virtualSize !== disk.virtualSize)
      throw changed(`it has ${found.virtualSize} bytes by now, it had ${disk.virtualSize}`);
    if (base === undefined) continue;
    if (overlaysOn(found, base.node) !== overlaysOn(disk, base.node))
      throw changed(`other images lie on top of node "${base.node}" by now`);
    const bitmap = found.bitmaps.find(({ name, node }) => name === base.name && node === base.node);
    if (bitmap?.recording !== true)
      throw changed(`its bitmap "${base.name}" is gone, or does not record any more`);
  }
}
