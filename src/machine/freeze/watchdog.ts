import { ConnectionError } from "../../errors/index.js";
import { formatRunObject, parseRunObject } from "../../point/index.js";
import type { EventWatch, QmpClient, QmpEvent } from "../../qmp/index.js";
import { isBelowOverlays } from "../checkpoints/overlays.js";
import { MachineBusyError, ScratchFullError, SnapshotLostError } from "../errors.js";
import type { ScratchLimit } from "./scratch-limit.js";
import type { FreezeDisk } from "../source.js";

/** A job in one of these states still preserves old data; "paused" is a moment of a drain, or a user's wish. */
export const INTACT_STATES: ReadonlySet<string> = new Set(["created", "running", "paused"]);

/**
 * Watches a frozen point by QEMU's events: jobs that end, scratch that fills up, a connection that dies.
 * The first of these fires `failed`.
 */
export class Watchdog {
  readonly #controller = new AbortController();
  readonly #watch: EventWatch;
  readonly #stopped = new AbortController();
  readonly #diskNames: ReadonlyMap<string, string>;
  readonly #limit: ScratchLimit;
  /** Jobs of others that begin; undefined where they do no harm. */
  readonly #others: EventWatch | undefined;
  /** The machine goes down: that explains what ends then. With -no-shutdown nothing does. */
  #isShutDown = false;

  private constructor(
    qmp: QmpClient,
    diskNames: ReadonlyMap<string, string>,
    limit: ScratchLimit,
    hasOverlays: boolean,
  ) {
    this.#diskNames = diskNames;
    this.#limit = limit;
    this.#watch = qmp.watch(
      ({ name, data }) =>
        name === "SHUTDOWN" ||
        (name === "JOB_STATUS_CHANGE" && diskNames.has(String(data["id"]))) ||
        (name === "BLOCK_WRITE_THRESHOLD" && limit.diskOf(String(data["node-name"])) !== undefined),
    );
    if (hasOverlays) this.#others = qmp.watch(isForeignJob);
  }

  /** Starts watching. Make it before the freeze. */
  static start(qmp: QmpClient, run: string, disks: readonly FreezeDisk[], limit: ScratchLimit): Watchdog {
    const names = disks.map(
      ({ disk }, number) => [formatRunObject({ run, disk: number, kind: "job" }), disk.name] as const,
    );
    const watchdog = new Watchdog(qmp, new Map(names), limit, disks.some(isBelowOverlays));
    void watchdog.#run();
    void watchdog.#watchOthers();
    return watchdog;
  }

  /** Fires with the error when the frozen point is lost, or soon will be. */
  get failed(): AbortSignal {
    return this.#controller.signal;
  }

  /** Jobs of the frozen point, with the names of their disks. */
  get jobs(): ReadonlyMap<string, string> {
    return this.#diskNames;
  }

  stop(): void {
    this.#stopped.abort();
    this.#watch[Symbol.dispose]();
    this.#others?.[Symbol.dispose]();
  }

  async #run(): Promise<void> {
    try {
      for (;;) await this.#judge(await this.#watch.next({ signal: this.#stopped.signal }));
    } catch (error) {
      if (!this.#stopped.signal.aborted) this.#controller.abort(this.#explain(error));
    }
  }

  #explain(error: unknown): unknown {
    const isEnd = error instanceof SnapshotLostError || error instanceof ConnectionError;
    if (!this.#isShutDown || !isEnd) return error;
    return new SnapshotLostError("Cannot go on with the backup: the machine was shut down meanwhile", {
      cause: error,
      hint: "Run it again: with --qmp when the machine runs, with --image while it is off",
    });
  }

  /** A loop of its own: no question to QEMU may delay it. */
  async #watchOthers(): Promise<void> {
    if (this.#others === undefined) return;
    try {
      const { data } = await this.#others.next({ signal: this.#stopped.signal });
      const id = String(data["id"]);
      throw new MachineBusyError(
        `Cannot read what changed: job "${id}" of another program began, which may change the disks' snapshots`,
        { hint: "Run the backup again when that job has ended" },
      );
    } catch (error) {
      if (!this.#stopped.signal.aborted) this.#controller.abort(error);
    }
  }

  async #judge({ name, data }: QmpEvent): Promise<void> {
    if (name === "SHUTDOWN") {
      this.#isShutDown = true;
      return;
    }
    if (name === "JOB_STATUS_CHANGE") {
      const status = String(data["status"]);
      if (INTACT_STATES.has(status)) return;
      throw lost(this.#diskNames.get(String(data["id"])) ?? "", `its job in QEMU is ${status}`);
    }
    const node = String(data["node-name"]);
    const limit = await this.#limit.passed(node);
    if (limit === undefined) return;
    const disk = this.#limit.diskOf(node) ?? "";
    throw new ScratchFullError(
      `Cannot back up disk ${disk}: its scratch reached the limit of ${limit} bytes, the guest overwrites too much meanwhile`,
      {
        hint: "Raise --scratch-limit, name a directory with more room with --scratch, or back up at a quieter time",
      },
    );
  }
}

/**
 * A job that begins. On images below a disk, commits and streams put a filter, which QEMU counts as an image in
 * `qemu:allocation-depth`: what an overlay holds could pass for unchanged.
 */
function isForeignJob({ name, data }: QmpEvent): boolean {
  if (name !== "JOB_STATUS_CHANGE" || data["status"] !== "created") return false;
  return parseRunObject(String(data["id"])) === undefined;
}

/** The frozen content of a disk is gone. */
export function lost(disk: string, why: string): SnapshotLostError {
  return new SnapshotLostError(`Read the frozen content of disk ${disk}: it is lost, ${why}`, {
    hint: "Somebody cancelled the job, or unplugged the disk, or QEMU failed; run the backup again",
  });
}
