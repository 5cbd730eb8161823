import { fstatSync } from "node:fs";
import { messageOf } from "../../errors/index.js";
import { step } from "../../flow/index.js";
import type { QmpAddress, QmpClient } from "../../qmp/index.js";
import { GuardError, ScratchFullError } from "../errors.js";
import type { Run } from "../run/run.js";
import { GuardProcess } from "./guard-process.js";
import type { ScratchBound } from "./orders.js";

/** How many guards may die during one run before it is given up. */
const MOST_DEATHS = 3;

/** What is protected. */
export interface ProtectionOptions {
  readonly run: Run;
  readonly qmp: QmpClient;
  readonly address: QmpAddress;
  /** Goes on, with a warning, where no guard can be had. */
  readonly allowUnguarded: boolean;
  readonly warn: (message: string) => void;
}

/** A descriptor of this process, and what it stood for when it was given: numbers are used again. */
interface Given {
  readonly fd: number;
  readonly inode: number;
}

/**
 * A run's protection against this process's death: a guard at its side, and a new one when that one dies or when
 * there is more to hold. Before a guard is relieved its successor holds everything, so that there is no moment without.
 */
export class Protection {
  readonly #options: ProtectionOptions;
  readonly #failed = new AbortController();
  #guard: GuardProcess | undefined;
  #connections: readonly Given[] = [];
  #scratch: readonly ScratchBound[] = [];
  #deaths = 0;
  /** Nothing can be hurt any more: a guard that dies now needs no successor. */
  #isOver = false;
  /** One change of guards at a time. */
  #turn: Promise<void> = Promise.resolve();

  private constructor(options: ProtectionOptions) {
    this.#options = options;
  }

  /** @throws {GuardError} when no guard can be started, unless that is allowed */
  static async start(options: ProtectionOptions): Promise<Protection> {
    const protection = new Protection(options);
    await protection.#change();
    return protection;
  }

  /** Fires when the run cannot go on: nothing protects it any more, or the scratch is full. */
  get failed(): AbortSignal {
    return this.#failed.signal;
  }

  /** Has scratch files watched. */
  watch(scratch: readonly ScratchBound[]): void {
    this.#scratch = scratch;
    this.#guard?.tell({ order: "watch", scratch });
  }

  /**
   * Has NBD connections held, in place of those before. Nothing may have been said on them yet: until this resolves
   * it is this process alone that holds them.
   *
   * @param descriptors of this process
   * @throws {GuardError} when no guard can be started, unless that is allowed
   */
  async hold(descriptors: readonly number[]): Promise<void> {
    if (this.#isOver) throw new GuardError("the frozen point is being taken down");
    this.#connections = descriptors.flatMap((fd) => {
      const inode = inodeOf(fd);
      return inode === undefined ? [] : [{ fd, inode }];
    });
    await this.#change();
  }

  /** The frozen point is being taken down by this process. */
  ending(): void {
    this.#isOver = true;
    this.#guard?.tell({ order: "ending" });
  }

  /** Has the duplicates of all NBD connections closed: their exports are gone. */
  async letGo(): Promise<void> {
    await this.#turn;
    this.#connections = [];
    await this.#guard?.letGo();
  }

  /** No more guards from now on; waits for one that is being changed. */
  async settle(): Promise<void> {
    this.#isOver = true;
    await this.#turn;
  }

  /** The run has ended: so does its guard. Never throws. */
  async end(): Promise<void> {
    await this.settle();
    await this.#guard?.end();
    this.#guard = undefined;
  }

  /** This process cannot end the run, and leaves that to the guard, as if it had died. Never throws. */
  async leave(): Promise<void> {
    await this.settle();
    this.#guard?.leave();
    this.#guard = undefined;
  }

  #change(): Promise<void> {
    const changed = this.#turn.then(() => this.#replace());
    this.#turn = changed.catch(() => undefined);
    return changed;
  }

  async #replace(): Promise<void> {
    const { run, qmp, address, allowUnguarded, warn } = this.#options;
    const previous = this.#guard;
    previous?.tell({ order: "succession", isUnderWay: true });
    try {
      const { guard, identity } = await GuardProcess.start(
        {
          ...{ run: run.id, runDirectory: run.directory, address },
          ...{ agent: run.record.holder, scratch: this.#scratch },
        },
        {
          qmp: qmp.fileDescriptor,
          connections: this.#connections.filter(isTheSame).map(({ fd }) => fd),
          previous,
        },
      );
      this.#guard = guard;
      void guard.ended.then((how) => this.#onDeath(guard, how));
      if (this.#isOver) guard.tell({ order: "ending" });
      void guard.full.then((what) => this.#onFull(what));
      await step("guard holds");
      try {
        run.plan({ guard: identity });
        await step("guard recorded");
      } finally {
        // Two that hold would both end the run some day.
        await previous?.end();
      }
    } catch (error) {
      previous?.tell({ order: "succession", isUnderWay: false });
      if (!allowUnguarded) throw error;
      warn(`Nothing protects the machine from the death of this process: ${messageOf(error)}`);
    }
  }

  #onDeath(guard: GuardProcess, how: string): void {
    if (this.#isOver || guard !== this.#guard) return;
    this.#guard = undefined;
    this.#deaths += 1;
    if (this.#deaths > MOST_DEATHS) {
      this.#failed.abort(new GuardError(`${this.#deaths} guards died, the last one: ${how}`));
      return;
    }
    this.#change().catch((error: unknown) => this.#failed.abort(error));
  }

  #onFull(what: string): void {
    const hint =
      "Raise --scratch-limit, name a directory with more room with --scratch, or back up at a quieter time";
    this.#failed.abort(
      new ScratchFullError(`Cannot go on with the backup: the guest overwrites too much meanwhile, ${what}`, {
        hint,
      }),
    );
  }
}

function isTheSame({ fd, inode }: Given): boolean {
  return inodeOf(fd) === inode;
}

/** undefined for a descriptor that was closed: the other end of a connection may break it off at any time. */
function inodeOf(fd: number): number | undefined {
  try {
    return fstatSync(fd).ino;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EBADF") throw error;
    return undefined;
  }
}
