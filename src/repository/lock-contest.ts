import { randomBytes } from "node:crypto";
import type { IoOptions } from "../bytes/index.js";
import { pause } from "../flow/index.js";
import { judgeOnAnyHost, type ProcessOnHost } from "../process/index.js";
import type { Storage } from "../storage/index.js";
import { LockedError } from "./errors.js";
import {
  describeHolder,
  encodeHolder,
  readHolder,
  readOccupant,
  type Holder,
  type Stranger,
} from "./holder.js";

/** Times of a lock, in milliseconds. */
export interface LockTimes {
  /** Between two heartbeats. */
  readonly heartbeat: number;
  /** Age of a heartbeat from which on a holder, of whom nothing else is known, may be gone. */
  readonly stale: number;
  /**
   * How long such a holder is watched for a sign of life: its clock may just be wrong. What says nothing about
   * its age (a heartbeat in the future, damage) is watched for `stale`.
   */
  readonly watch: number;
}

export const LOCK_TIMES: LockTimes = { heartbeat: 10_000, stale: 60_000, watch: 15_000 };

const ATTEMPTS = 16;

/** One attempt to become the holder of a lock. */
export class LockContest {
  readonly #storage: Storage;
  readonly #key: string;
  readonly #here: ProcessOnHost;
  readonly #times: LockTimes;
  readonly #io: IoOptions;

  constructor(
    storage: Storage,
    key: string,
    here: ProcessOnHost,
    times: LockTimes,
    signal: AbortSignal | undefined,
  ) {
    this.#storage = storage;
    this.#key = key;
    this.#here = here;
    this.#times = times;
    this.#io = { signal };
  }

  async win(): Promise<Holder> {
    for (let attempt = 0; attempt < ATTEMPTS; attempt += 1) {
      const mine = this.#newHolder();
      try {
        if (await this.#try(mine)) return mine;
      } catch (error) {
        // What failed may have made the lock this run's all the same, which lives on and would keep all others out.
        if (!(error instanceof LockedError)) await this.#giveBack(mine);
        throw error;
      }
    }
    throw new LockedError(`Cannot lock "${this.#key}": it changed hands ${ATTEMPTS} times meanwhile`, {
      hint: "Several runs want this machine at once: try again later",
    });
  }

  async #try(mine: Holder): Promise<boolean> {
    const isFirst = await this.#storage.put(this.#key, encodeHolder(mine), { ifAbsent: true, ...this.#io });
    if (!isFirst && !(await this.#succeed(mine))) return false;
    // Storages whose `ifAbsent` is not to be trusted show here whose bytes are there.
    return (await readHolder(this.#storage, this.#key, this.#io))?.token === mine.token;
  }

  /** As far as the storage lets it; what stays is found stale when this process has ended. */
  async #giveBack(mine: Holder): Promise<void> {
    try {
      const found = await readHolder(this.#storage, this.#key);
      if (found?.token === mine.token) await this.#storage.delete(this.#key);
    } catch {
      // The failure that led here is the news.
    }
  }

  /** Takes the lock over from a holder that is gone. @returns false when it changed hands meanwhile */
  async #succeed(mine: Holder): Promise<boolean> {
    const gone = await readOccupant(this.#storage, this.#key, this.#io);
    if (gone === undefined) return false;
    await this.#requireGone(gone, this.#key);
    const claims: string[] = [];
    for (let predecessor: Holder | Stranger = gone; ;) {
      const claim = `${this.#key}.${predecessor.token}`;
      claims.push(claim);
      const isFirst = await this.#storage.put(claim, encodeHolder(mine), { ifAbsent: true, ...this.#io });
      if (isFirst) break;
      const claimer = await readOccupant(this.#storage, claim, this.#io);
      if (claimer === undefined) return false;
      await this.#requireGone(claimer, claim);
      predecessor = claimer;
    }
    // Claims go after the lock has changed: who comes late then finds that it is not the old holder's any more.
    const found = await readOccupant(this.#storage, this.#key, this.#io);
    const isUnchanged = found?.token === gone.token;
    if (isUnchanged) await this.#storage.put(this.#key, encodeHolder(mine), this.#io);
    for (const claim of isUnchanged ? claims : claims.slice(-1)) await this.#storage.delete(claim);
    return isUnchanged;
  }

  /** @throws {LockedError} when the holder is alive, or may be */
  async #requireGone(holder: Holder | Stranger, key: string): Promise<void> {
    const { watch, stale } = this.#times;
    if ("unreadable" in holder) {
      await this.#watch(holder, key, stale);
      return;
    }
    const heartbeat = new Date(holder.heartbeat);
    const verdict = await judgeOnAnyHost(holder, this.#here, heartbeat);
    if (verdict === "gone") return;
    if (verdict === "alive") throw this.#locked(holder, `Wait for it, or end process ${holder.pid}`);
    const age = Date.now() - heartbeat.getTime();
    if (Math.abs(age) < stale) throw this.#locked(holder, this.#hint(key));
    await this.#watch(holder, key, age > 0 ? watch : stale);
  }

  /** Looks for a sign of life, for `duration` milliseconds. @throws {LockedError} when there is one */
  async #watch(holder: Holder | Stranger, key: string, duration: number): Promise<void> {
    const { watch } = this.#times;
    for (let rest = duration; rest > 0; rest -= watch) {
      await pause(Math.min(rest, watch), this.#io.signal);
      const later = await readOccupant(this.#storage, key, this.#io);
      if (later === undefined) return;
      if (signOf(later) !== signOf(holder)) throw this.#locked(later, this.#hint(key));
    }
  }

  #hint(key: string): string {
    return `Wait for it; if that run is surely gone, remove "${key}" from ${this.#storage.description}`;
  }

  #locked(holder: Holder | Stranger, hint: string): LockedError {
    const who =
      "unreadable" in holder
        ? "somebody changes it who writes no lock of tidemark's"
        : `${describeHolder(holder)} has held it since ${holder.since}`;
    return new LockedError(`Cannot lock "${this.#key}": ${who}`, { hint });
  }

  #newHolder(): Holder {
    const now = new Date().toISOString();
    return { token: randomBytes(16).toString("hex"), ...this.#here, since: now, heartbeat: now };
  }
}

/** What is new with every sign of life. */
function signOf(holder: Holder | Stranger): string {
  return "unreadable" in holder ? holder.token : `${holder.token} ${holder.heartbeat}`;
}
