import { stat, statfs } from "node:fs/promises";
import { dirname } from "node:path";
import { formatSize } from "../../bytes/index.js";
import { judgeOnThisHost, thisProcess, type ProcessIdentity } from "../../process/index.js";
import type { ScratchBound } from "./orders.js";

/** Milliseconds between two looks at the files: the file system tells nobody that it fills up. */
const INTERVAL = 250;
/** How long an agent may take to begin with its teardown once a bound is passed, in milliseconds … */
const PATIENCE = 2000;
/** … and to end it. */
const TEARDOWN_PATIENCE = 20_000;

/**
 * Not made yet, deleted already, or in a place that only QEMU sees: what cannot be looked at cannot be watched, and
 * it must not end the guard.
 */
const OUT_OF_SIGHT = { size: 0, blocks: 0, bavail: Infinity, bsize: 1 };

/**
 * Watches scratch files against their bounds. QEMU reports growth to the agent, which ends the backup in time; this
 * is for an agent that is stopped or stuck, before the guest's writes fail for want of room.
 */
export class ScratchWatch {
  readonly #agent: ProcessIdentity;
  readonly #onFull: (what: string) => void;
  readonly #timer: NodeJS.Timeout;
  #bounds: readonly ScratchBound[] = [];
  #passedAt: number | undefined;
  #isEnding = false;
  #isLooking = false;

  constructor(agent: ProcessIdentity, onFull: (what: string) => void) {
    this.#agent = agent;
    this.#onFull = onFull;
    this.#timer = setInterval(() => void this.#look(), INTERVAL);
    this.#timer.unref();
  }

  /** The files to watch, in place of those before. */
  bound(bounds: readonly ScratchBound[]): void {
    this.#bounds = bounds;
  }

  /** The agent has begun to tear down by itself. */
  agentEnds(): void {
    this.#isEnding = true;
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  async #look(): Promise<void> {
    if (this.#isLooking) return;
    this.#isLooking = true;
    try {
      const passed = (await Promise.all(this.#bounds.map(judge))).find((what) => what !== undefined);
      if (passed !== undefined) await this.#press(passed);
    } finally {
      this.#isLooking = false;
    }
  }

  /** Tells the agent, once; then ends it when it does not act. */
  async #press(what: string): Promise<void> {
    const now = performance.now();
    if (this.#passedAt === undefined) {
      this.#passedAt = now;
      this.#onFull(what);
    }
    if (now < this.#passedAt + (this.#isEnding ? TEARDOWN_PATIENCE : PATIENCE)) return;
    // Its control connection ends with it: then the guard takes over.
    if ((await judgeOnThisHost(this.#agent, await thisProcess())) === "alive") kill(this.#agent.pid);
  }
}

/** @returns what is wrong; undefined while the files keep within their bound */
async function judge({ limit, reserve, files }: ScratchBound): Promise<string | undefined> {
  const sizes = await Promise.all(files.map(bytesOf));
  const taken = sizes.reduce((sum, bytes) => sum + bytes, 0);
  if (taken > limit) return `it reached the limit of ${limit} bytes`;
  const free = await Promise.all([...new Set(files.map((file) => dirname(file)))].map(freeBytes));
  const least = Math.min(...free);
  return least < reserve ? `its file system has only ${formatSize(least)} left` : undefined;
}

/** Bytes that a file takes; what a file system allots ahead does not count. */
async function bytesOf(file: string): Promise<number> {
  const { size, blocks } = await stat(file).catch(() => OUT_OF_SIGHT);
  return Math.min(size, blocks * 512);
}

async function freeBytes(directory: string): Promise<number> {
  const { bavail, bsize } = await statfs(directory).catch(() => OUT_OF_SIGHT);
  return bavail * bsize;
}

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch (error) {
    // It has ended this very moment.
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}
