import type { IoOptions } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import { step } from "../flow/index.js";
import { QmpClient, type QmpAddress } from "../qmp/index.js";
import { discover, type LiveDisk, type RefusedDisk } from "./discover/discover.js";
import { ForeignServerError, RunBusyError } from "./errors.js";
import { freezeDisks } from "./freeze/freeze.js";
import { Protection } from "./guard/protection.js";
import { identify, stateOf } from "./discover/identity.js";
import { takeInventory } from "./run/leftovers.js";
import {
  assertDisksSupported,
  assertFeatures,
  assertNoForeignJobs,
  assertNotMigrating,
} from "./discover/readiness.js";
import type { MachinePlace } from "./run/run-record.js";
import { placeOfMonitor, Run } from "./run/run.js";
import { chooseDisks, isCalled, type DiskChoice } from "./discover/select.js";
import type { FreezeRequest, FrozenPoint, MachineIdentity, QmpSource } from "./source.js";
import { removeBitmaps } from "./teardown/teardown.js";

/** How to open a live machine. */
export interface LiveMachineOptions {
  readonly address: QmpAddress;
  /** Where runs keep their state and locks on this host. */
  readonly runDirectory: string;
  /** The disks to look at, and their names; default all that can be backed up. */
  readonly select?: readonly DiskChoice[] | undefined;
  /**
   * Only look: takes no lock and changes nothing. Works beside a run when the machine has a second monitor.
   */
  readonly lookOnly?: boolean | undefined;
  /**
   * A second process, the guard, takes the frozen point down if this one dies. Default true. Without it, the death of
   * this process leaves a job whose scratch grows until the guest's writes fail.
   */
  readonly guard?: boolean | undefined;
  /** Goes on where no guard can be had; without that, disks in iothreads are not frozen unguarded. */
  readonly allowUnguarded?: boolean | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** A disk of a live machine with its name. */
export type NamedLiveDisk = LiveDisk & { readonly name: string };

interface Snapshot {
  readonly identity: MachineIdentity;
  readonly disks: readonly NamedLiveDisk[];
  readonly refused: readonly RefusedDisk[];
}

/**
 * Opens the machine behind a QMP monitor: takes the host's lock on it, connects, and finds its disks. Nothing
 * in it is changed.
 *
 * @throws {RunBusyError} when another run has the machine
 * @throws {QmpBusyError} {QmpNotFoundError} {QmpProtocolError} when the monitor cannot be had
 * @throws {UsageError} when a selected disk is not there
 */
export async function openLiveMachine(options: LiveMachineOptions): Promise<LiveMachine> {
  return await LiveMachine.open(options);
}

/** A machine in a running QEMU. Use `openLiveMachine`. */
export class LiveMachine implements QmpSource, AsyncDisposable {
  readonly qmp: QmpClient;
  readonly address: QmpAddress;
  readonly runDirectory: string;
  readonly place: MachinePlace;
  readonly #run: Run | undefined;
  readonly #options: LiveMachineOptions;
  #snapshot: Snapshot;
  #guard: Protection | undefined;
  #isFrozen = false;
  #leaveRecord = false;

  private constructor(
    qmp: QmpClient,
    run: Run | undefined,
    place: MachinePlace,
    options: LiveMachineOptions,
    snapshot: Snapshot,
  ) {
    this.qmp = qmp;
    this.address = options.address;
    this.runDirectory = options.runDirectory;
    this.place = place;
    this.#run = run;
    this.#options = options;
    this.#snapshot = snapshot;
  }

  /** See `openLiveMachine`. */
  static async open(options: LiveMachineOptions): Promise<LiveMachine> {
    const { address, runDirectory, signal, lookOnly = false } = options;
    const place = await placeOfMonitor(address);
    const run = lookOnly ? undefined : await Run.acquire(runDirectory, place, { signal });
    let qmp: QmpClient | undefined;
    try {
      await step("machine locked");
      qmp = await QmpClient.connect(address, { signal });
      await assertFeatures(qmp, { signal });
      const snapshot = await look(qmp, options, { signal });
      await step("machine opened");
      return new LiveMachine(qmp, run, place, options, snapshot);
    } catch (error) {
      await qmp?.close();
      run?.release();
      throw error;
    }
  }

  get identity(): MachineIdentity {
    return this.#snapshot.identity;
  }

  get disks(): readonly NamedLiveDisk[] {
    return this.#snapshot.disks;
  }

  /** Disks that cannot be backed up at all, with the reason. */
  get refused(): readonly RefusedDisk[] {
    return this.#snapshot.refused;
  }

  /** The run that has the machine's lock. @throws {UsageError} when the machine was opened to look only */
  assertWorking(): Run {
    if (this.#run !== undefined) return this.#run;
    throw new UsageError("The machine was opened to look at it, not to work on it");
  }

  /** The run's id; undefined when the machine was opened to look only. */
  get runId(): string | undefined {
    return this.#run?.id;
  }

  async refresh(options: IoOptions = {}): Promise<void> {
    this.#snapshot = await look(this.qmp, this.#options, options);
  }

  async assertReady(options: IoOptions = {}): Promise<void> {
    const { guard = true, allowUnguarded = false } = this.#options;
    assertDisksSupported(this.disks, this.refused, guard || allowUnguarded);
    assertNoForeignJobs(this.disks);
    await this.assertHere(options);
    const inventory = await takeInventory(this.qmp, options);
    const [foreign] = inventory.foreignExports;
    if (foreign !== undefined) throw new ForeignServerError(`it serves export "${foreign}"`);
    const other = inventory.runs.find(
      ({ run, exports, jobs, nodes }) =>
        run !== this.#run?.id && exports.length + jobs.length + nodes.length > 0,
    );
    if (other === undefined) return;
    throw new RunBusyError(
      `Cannot back up the machine: run ${other.run} left things in it, or still works on it`,
      {
        hint: "Run tidemark cleanup on it first",
      },
    );
  }

  async assertHere(options: IoOptions = {}): Promise<void> {
    await assertNotMigrating(this.qmp, options);
  }

  async freeze(request: FreezeRequest, options: IoOptions = {}): Promise<FrozenPoint> {
    if (this.#isFrozen) throw new UsageError("The machine is frozen already: release that point first");
    this.#isFrozen = true;
    try {
      await this.assertReady(options);
      await this.#protect(request);
      return await freezeDisks({
        qmp: this.qmp,
        address: this.address,
        run: this.assertWorking(),
        guard: this.#guard,
        request,
        look: async (io) => {
          const [{ disks }, status] = await Promise.all([
            discover(this.qmp, io),
            this.qmp.execute("query-status", undefined, io),
          ]);
          return { disks, state: stateOf(status) };
        },
        signal: options.signal,
        onEnd: (isClean) => {
          this.#isFrozen = false;
          this.#leaveRecord ||= !isClean;
        },
      });
    } catch (error) {
      this.#isFrozen = false;
      throw error;
    }
  }

  /** Removes bitmaps of ours that the catalogue rule lets go, in one transaction. */
  async removeBitmaps(bitmaps: readonly { readonly node: string; readonly name: string }[]): Promise<void> {
    this.assertWorking();
    await removeBitmaps(this.qmp, bitmaps);
  }

  async close(): Promise<void> {
    await this.#guard?.settle();
    await this.qmp.close();
    await step("monitor left");
    const isSomethingLeft = this.#leaveRecord || this.#isFrozen;
    this.#run?.release({ leaveRecord: isSomethingLeft });
    await step("machine unlocked");
    // Last: until then the guard would end what is left of the run. So it does when this process could not.
    if (isSomethingLeft) await this.#guard?.leave();
    else await this.#guard?.end();
    await step("guard dismissed");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Before anything is made. @throws {GuardError} when no guard can be started, unless that is allowed */
  async #protect({ warn = () => undefined }: FreezeRequest): Promise<void> {
    const { guard = true, allowUnguarded = false } = this.#options;
    if (!guard) return;
    await this.#guard?.end();
    const { qmp, address } = this;
    this.#guard = await Protection.start({ run: this.assertWorking(), qmp, address, allowUnguarded, warn });
    await step("guard started");
  }
}

/** Takes a fresh picture of the machine, as far as it was selected. */
async function look(qmp: QmpClient, { select }: LiveMachineOptions, options: IoOptions): Promise<Snapshot> {
  const { disks, refused } = await discover(qmp, options);
  const chosen = chooseDisks(disks, select, refused);
  return {
    identity: await identify(qmp, disks, options),
    disks: chosen,
    refused: select === undefined ? refused : refused.filter((disk) => isChosen(disk, select)),
  };
}

function isChosen(disk: RefusedDisk, choices: readonly DiskChoice[]): boolean {
  return choices.some(({ device }) => isCalled(disk, device));
}
