import { setImmediate } from "node:timers/promises";
import type { IoOptions } from "../../bytes/index.js";
import { anySignal, step } from "../../flow/index.js";
import { formatRunObject } from "../../point/index.js";
import type { QmpAddress, QmpClient } from "../../qmp/index.js";
import type { Protection } from "../guard/protection.js";
import { reach } from "../teardown/reach.js";
import type { Run } from "../run/run.js";
import type {
  DropOptions,
  FreezeRequest,
  FrozenDisk,
  FrozenPoint,
  KeepOptions,
  MachineState,
} from "../source.js";
import { removeBitmaps, tearDown } from "../teardown/teardown.js";
import { assertChainsUnchanged, type Look } from "./chains.js";
import { INTACT_STATES, lost, type Watchdog } from "./watchdog.js";

/** What a frozen point in a QEMU process consists of. */
export interface FrozenParts {
  readonly qmp: QmpClient;
  readonly address: QmpAddress;
  readonly run: Run;
  readonly guard?: Protection | undefined;
  readonly request: FreezeRequest;
  readonly look: Look;
  /** Called when nothing is frozen any more. @param isClean nothing of the run is left */
  readonly onEnd: (isClean: boolean) => void;
  readonly watchdog: Watchdog;
  readonly disks: readonly FrozenDisk[];
  readonly frozenAt: Date;
  readonly state: MachineState;
  readonly plan: { readonly socketPath: string | null; readonly files: readonly string[] };
}

/** A frozen point in a QEMU process. */
export class QemuFrozenPoint implements FrozenPoint {
  readonly disks: readonly FrozenDisk[];
  readonly frozenAt: Date;
  readonly state: MachineState;
  readonly failed: AbortSignal;
  readonly #parts: FrozenParts;
  #released: Promise<void> | undefined;

  constructor(parts: FrozenParts) {
    this.disks = parts.disks;
    this.frozenAt = parts.frozenAt;
    this.state = parts.state;
    this.failed = anySignal(parts.watchdog.failed, parts.guard?.failed);
    this.#parts = parts;
  }

  async protect(descriptors: readonly number[]): Promise<void> {
    await this.#parts.guard?.hold(descriptors);
  }

  async assertIntact(options: IoOptions = {}): Promise<void> {
    const { qmp, request, look, watchdog } = this.#parts;
    await assertChainsUnchanged(request, look, options);
    const jobs = new Map((await qmp.execute("query-jobs", undefined, options)).map((job) => [job.id, job]));
    for (const [id, disk] of watchdog.jobs) {
      const status = jobs.get(id)?.status ?? "gone";
      if (!INTACT_STATES.has(status)) throw lost(disk, `its job in QEMU is ${status}`);
    }
    // A job that failed and was restarted in between would look well now; its event tells, once all that came with
    // the answer has been looked at.
    await setImmediate();
    watchdog.failed.throwIfAborted();
  }

  release(closeConnections: () => Promise<void>): Promise<void> {
    this.#released ??= this.#release(closeConnections);
    return this.#released;
  }

  async keep(options: KeepOptions = {}): Promise<void> {
    const { remove = this.#bases() } = options;
    await removeBitmaps(this.#parts.qmp, [...remove, ...this.#transient()]);
  }

  async drop(options: DropOptions = {}): Promise<void> {
    const checkpoint = options.keepCheckpoint === true ? [] : this.#checkpoint();
    await removeBitmaps(this.#parts.qmp, [...checkpoint, ...this.#transient()]);
  }

  async #release(closeConnections: () => Promise<void>): Promise<void> {
    const { qmp, address, run, guard, watchdog, plan, onEnd } = this.#parts;
    watchdog.stop();
    guard?.ending();
    let isClosed = false;
    const closeOwn = async (): Promise<void> => {
      if (isClosed) return;
      isClosed = true;
      await closeConnections();
    };
    let isClean = false;
    try {
      await using reached = await reach(qmp, address);
      await tearDown(reached.qmp, {
        ...plan,
        run: run.id,
        // A connection is closed when the last duplicate is, and the server is stopped only after that.
        closeConnections: async () => {
          await closeOwn();
          await guard?.letGo();
        },
      });
      // Room that is short from now on is no concern of this run's.
      guard?.watch([]);
      isClean = true;
      await step("released");
    } finally {
      // If QEMU may still serve the exports: the guard holds on to them.
      await closeOwn();
      onEnd(isClean);
    }
  }

  #bases(): { node: string; name: string }[] {
    // One below an external snapshot costs nothing, and is there when somebody commits the snapshot.
    return this.#requested().flatMap(({ disk, base }) => (base?.node === disk.node ? base : []));
  }

  #checkpoint(): { node: string; name: string }[] {
    return this.disks.map(({ disk: { node }, bitmap }) => ({ node, name: bitmap }));
  }

  #transient(): { node: string; name: string }[] {
    return this.#requested().map(({ disk: { node } }, disk) => ({
      node,
      name: formatRunObject({ run: this.#parts.run.id, disk, kind: "tmp" }),
    }));
  }

  #requested(): FreezeRequest["disks"] {
    return this.#parts.request.disks;
  }
}
