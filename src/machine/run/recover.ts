import type { IoOptions } from "../../bytes/index.js";
import type { Checkpoints } from "../checkpoints/catalogue.js";
import { bitmapsToRemove, type RemovableBitmap } from "../checkpoints/remove.js";
import { ForeignServerError, RunBusyError } from "../errors.js";
import { endRun } from "../teardown/end-run.js";
import { objectsOf, takeInventory, type QemuInventory, type RunObjects } from "./leftovers.js";
import type { QmpSource } from "../source.js";
import { readRecords, type FoundRun } from "./run-record.js";
import { removeBitmaps } from "../teardown/teardown.js";

/** How to clean up after dead runs. */
export interface RecoverOptions extends IoOptions {
  /** Decides on checkpoints' bitmaps; without it they all stay. */
  readonly checkpoints?: Checkpoints | undefined;
  /** Id of the checkpoint that the run is to start from: it stays. */
  readonly needed?: string | undefined;
  /**
   * What to do about a run that has things in QEMU, but no state file in the run directory, so that nobody
   * can tell whether it lives: `refuse` (default), or `clean` because the operator knows.
   */
  readonly unknownRuns?: "refuse" | "clean" | undefined;
  /** Only list. */
  readonly dryRun?: boolean | undefined;
}

/** What a dead run left. */
export interface LeftoverRun {
  readonly run: string;
  /** No state file is known here that would tell whether it lives. Only a look shows such runs. */
  readonly mayBeAlive: boolean;
  readonly exports: readonly string[];
  readonly jobs: readonly string[];
  readonly nodes: readonly string[];
  readonly files: readonly string[];
  readonly bitmaps: readonly string[];
}

/** What was found, and removed unless it was only listed. */
export interface Leftovers {
  readonly runs: readonly LeftoverRun[];
  /** Checkpoints' bitmaps by the catalogue rule. */
  readonly bitmaps: readonly RemovableBitmap[];
}

/** A dead run: what QEMU has of it, and its record where there is one. */
interface DeadRun {
  readonly objects: RunObjects;
  readonly found: FoundRun | undefined;
}

/**
 * Cleans up what dead runs left in a machine and beside it: exports, jobs, scratch, transient bitmaps, the NBD
 * server, files. Checkpoints' bitmaps go by the catalogue rule alone, and last: all else is removed also when the
 * catalogue cannot be read.
 *
 * @throws {RunBusyError} when a run that lives (or may live) has things in the machine; nothing is touched
 * @throws {ForeignServerError} when another program exports over NBD; nothing is touched
 * @throws {MachineBusyError} when there is something to do, and the machine migrates; nothing is touched
 * @throws whatever the catalogue throws
 * @throws {TeardownError} when something could not be removed; the rest is
 */
export async function recover(machine: QmpSource, options: RecoverOptions = {}): Promise<Leftovers> {
  const { signal, dryRun = false, checkpoints } = options;
  const inventory = await takeInventory(machine.qmp, { signal });
  const [foreign] = inventory.foreignExports;
  if (foreign !== undefined && !dryRun) throw new ForeignServerError(`it serves export "${foreign}"`);
  const dead = await findDead(machine, inventory, options);
  const runs = dead.map(describe);
  if (!dryRun) await cleanAll(machine, dead, { signal });
  // Last: a catalogue that cannot be read must not keep a scratch growing until the guest's writes fail.
  const bitmaps = checkpoints === undefined ? [] : await judgeBitmaps(machine, checkpoints, options.needed);
  if (!dryRun && bitmaps.length > 0) {
    await machine.assertHere({ signal });
    await removeBitmaps(machine.qmp, bitmaps);
    await machine.refresh({ signal });
  }
  return { runs, bitmaps };
}

async function cleanAll(machine: QmpSource, dead: readonly DeadRun[], { signal }: IoOptions): Promise<void> {
  machine.assertWorking();
  if (dead.length === 0) return;
  await machine.assertHere({ signal });
  for (const run of dead) {
    signal?.throwIfAborted();
    await clean(machine, run);
  }
  await machine.refresh({ signal });
}

/**
 * The runs that are dead and concern this machine: by what QEMU has, by the socket, or by the address (QEMU
 * was restarted since; only files are left then).
 */
async function findDead(
  machine: QmpSource,
  inventory: QemuInventory,
  { unknownRuns = "refuse", dryRun = false }: RecoverOptions,
): Promise<DeadRun[]> {
  const records = await readRecords(machine.runDirectory);
  const { key, address } = machine.place;
  const others = inventory.runs.filter(({ run }) => run !== machine.runId);
  for (const objects of others) {
    const found = records.find(({ run }) => run === objects.run);
    // A transient bitmap alone is no sign of life: its run may have ended while QEMU did not answer.
    const holdsNothing = objects.exports.length + objects.jobs.length + objects.nodes.length === 0;
    if (dryRun || found?.liveness === "dead" || (found === undefined && holdsNothing)) continue;
    if (found !== undefined) throw alive(found);
    if (unknownRuns === "refuse") throw unknown(objects.run, machine.runDirectory);
  }
  const concerned = records.filter(
    ({ run, record, liveness }) =>
      liveness === "dead" &&
      (inventory.runs.some((objects) => objects.run === run) ||
        (key !== null && record?.machine.key === key) ||
        record?.machine.address === address),
  );
  const runs = new Set([...others.map(({ run }) => run), ...concerned.map(({ run }) => run)]);
  return [...runs]
    .map((run) => ({
      objects: objectsOf(inventory, run),
      found: records.find((found) => found.run === run),
    }))
    .filter(({ found }) => found === undefined || found.liveness === "dead");
}

/** A transient bitmap alone is no sign of life: one on a read-only node cannot even be removed. */
function holdsSomething({ exports, jobs, nodes }: RunObjects): boolean {
  return exports.length + jobs.length + nodes.length > 0;
}

async function clean(machine: QmpSource, { objects, found }: DeadRun): Promise<void> {
  await endRun(machine.qmp, {
    run: objects.run,
    directory: machine.runDirectory,
    record: found?.record,
    bitmaps: objects.bitmaps,
    // Nothing says where its server listens. But QEMU has one at most, and another program's export would have ended this.
    stopAnyServer: found?.record === undefined && objects.exports.length + objects.nodes.length > 0,
  });
}

async function judgeBitmaps(
  machine: QmpSource,
  checkpoints: Checkpoints,
  needed: string | undefined,
): Promise<RemovableBitmap[]> {
  const context = { ...checkpoints, machineUuid: machine.identity.uuid, needed };
  const removable: RemovableBitmap[] = [];
  for (const disk of machine.disks) removable.push(...(await bitmapsToRemove(disk, context)));
  return removable;
}

function describe({ objects, found }: DeadRun): LeftoverRun {
  return {
    run: objects.run,
    mayBeAlive: found === undefined && holdsSomething(objects),
    exports: objects.exports,
    jobs: objects.jobs,
    nodes: objects.nodes,
    files: [...new Set([...objects.files, ...(found?.record?.files ?? [])])],
    bitmaps: objects.bitmaps.map(({ name }) => name),
  };
}

function alive({ run, record }: FoundRun): RunBusyError {
  return new RunBusyError(
    `Cannot clean up the machine: run ${run} of process ${record?.holder.pid ?? "(unknown)"} works on it`,
    { hint: "Wait until it has ended" },
  );
}

function unknown(run: string, directory: string): RunBusyError {
  return new RunBusyError(
    `Cannot clean up the machine: run ${run} has things in it, and ${directory} does not say whether it lives`,
    {
      hint: "It was started by another user or in another container: run tidemark cleanup there, or wait until it has ended",
    },
  );
}
