import { randomInt } from "node:crypto";
import { chmod, lstat, mkdir, stat, utimes } from "node:fs/promises";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { IoOptions } from "../../bytes/index.js";
import { messageOf, TidemarkError } from "../../errors/index.js";
import { newRunId } from "../../point/index.js";
import { thisProcess } from "../../process/index.js";
import { formatQmpAddress, type QmpAddress } from "../../qmp/index.js";
import { RunBusyError } from "../errors.js";
import {
  HEARTBEAT,
  pathOf,
  readRecords,
  removeRecord,
  writeRecord,
  type FoundRun,
  type MachinePlace,
  type RunRecord,
} from "./run-record.js";

/** Tries of two runs that met, before both give way. */
const TRIES = 4;
/** How long a new run waits for the guard of a dead one to end its work, in milliseconds. */
const GUARD_PATIENCE = 10_000;

/**
 * One invocation that works on a machine, and the host's lock on that machine.
 *
 * The lock is the state file itself, keyed by the QMP socket's device and inode (so by any of its names): a
 * run writes its own and then looks for others. Whoever writes second sees the first, so two never both go
 * on; the file of a dead run locks nothing, and since nobody shares a file there is none to wrest from a dead
 * holder.
 */
export class Run {
  /** 8 hex digits: everything the run makes bears them. */
  readonly id: string;
  readonly directory: string;
  #record: RunRecord;
  readonly #heartbeat: NodeJS.Timeout;

  private constructor(directory: string, record: RunRecord) {
    this.id = record.run;
    this.directory = directory;
    this.#record = record;
    this.#heartbeat = setInterval(() => {
      const now = new Date();
      // A failed heartbeat is no failed run: within this pid namespace it is not even looked at.
      utimes(pathOf(directory, record.run), now, now).catch(() => undefined);
    }, HEARTBEAT);
    this.#heartbeat.unref();
  }

  /**
   * Takes the machine for this run.
   *
   * @param runDirectory where runs keep their state; made with mode 0700 when it is not there
   * @throws {RunBusyError} when another run has it
   */
  static async acquire(runDirectory: string, place: MachinePlace, options: IoOptions = {}): Promise<Run> {
    await prepareDirectory(runDirectory);
    const started = performance.now();
    for (let attempt = 1; ;) {
      options.signal?.throwIfAborted();
      const record: RunRecord = {
        version: 1,
        run: newRunId(),
        holder: await thisProcess(),
        machine: place,
        server: null,
        files: [],
      };
      writeRecord(runDirectory, record);
      const rival = await findRival(runDirectory, record);
      if (rival === undefined) return new Run(runDirectory, record);
      removeRecord(runDirectory, record.run);
      const isSoonOver = rival.liveness === "ending" && performance.now() < started + GUARD_PATIENCE;
      if (!isSoonOver && attempt === TRIES) throw busy(place, rival);
      if (!isSoonOver) attempt += 1;
      // Two that met both gave way: the next time they come apart.
      await sleep(randomInt(10, 100));
    }
  }

  get record(): RunRecord {
    return this.#record;
  }

  /** Writes down, in the state file, what is about to be made. */
  plan(made: Partial<Pick<RunRecord, "guard" | "server" | "files">>): void {
    this.#record = { ...this.#record, ...made };
    writeRecord(this.directory, this.#record);
  }

  /**
   * Ends the run and its lock.
   *
   * @param options.leaveRecord something is left behind: the record stays, and tells whoever comes that its
   *   run is dead once this process has ended
   */
  release(options: { readonly leaveRecord?: boolean } = {}): void {
    clearInterval(this.#heartbeat);
    if (options.leaveRecord !== true) removeRecord(this.directory, this.id);
  }
}

/** The place of a machine behind a monitor: keyed by the unix socket's device and inode, or the TCP address. */
export async function placeOfMonitor(address: QmpAddress): Promise<MachinePlace> {
  const text = formatQmpAddress(address);
  const key = address.transport === "tcp" ? `tcp:${text}` : await keyOfFile(address.path);
  return { address: text, key };
}

/** The place of a machine that is off: keyed by its first image's device and inode. */
export async function placeOfImages(files: readonly string[]): Promise<MachinePlace> {
  const [first] = files;
  return { address: `images ${files.join(" ")}`, key: first === undefined ? null : await keyOfFile(first) };
}

/** Device and inode: a file by any of its names; null when there is none. */
async function keyOfFile(path: string): Promise<string | null> {
  try {
    const { dev, ino } = await stat(path, { bigint: true });
    return `${dev.toString()}:${ino.toString()}`;
  } catch (error) {
    // Opening it will say what is wrong with the path.
    if (["ENOENT", "ENOTDIR", "EACCES"].includes((error as NodeJS.ErrnoException).code ?? "")) return null;
    throw error;
  }
}

async function findRival(directory: string, own: RunRecord): Promise<FoundRun | undefined> {
  const { key } = own.machine;
  if (key === null) return undefined;
  try {
    const others = await readRecords(directory);
    return others.find(
      ({ run, record, liveness }) => run !== own.run && liveness !== "dead" && record?.machine.key === key,
    );
  } catch (error) {
    removeRecord(directory, own.run);
    throw error;
  }
}

/** The directory must be ours alone: its files say which processes are alive and which files may go. */
async function prepareDirectory(path: string): Promise<void> {
  const unusable = (why: string, hint: string, cause?: unknown): TidemarkError =>
    new TidemarkError("TM_RUN_DIRECTORY", `Cannot use run directory ${path}: ${why}`, { hint, cause });
  try {
    const created = await mkdir(path, { recursive: true, mode: 0o700 });
    if (created !== undefined) await chmod(path, 0o700);
    // Of the path as it is: a link could be made to lead elsewhere.
    const found = await lstat(path);
    const { uid, mode } = found;
    if (!found.isDirectory() || uid !== process.geteuid?.() || (mode & 0o022) !== 0) {
      const what = found.isDirectory() ? "" : "is no directory itself, ";
      throw unusable(
        `it ${what}belongs to user ${uid} with mode ${(mode & 0o777).toString(8)}, others could change it`,
        "Give it to the user that runs tidemark, with mode 0700, or name another one",
      );
    }
    // Whoever can rename it can put another one in its place.
    const parent = await stat(dirname(path));
    if ((parent.mode & 0o002) !== 0 && (parent.mode & 0o1000) === 0)
      throw unusable("everybody may write in the directory it is in", "Take that away (chmod o-w)");
  } catch (error) {
    if (error instanceof TidemarkError) throw error;
    const hint = "TIDEMARK_RUNTIME_DIR names the directory that it is made in";
    throw unusable(messageOf(error), hint, error);
  }
}

function busy(place: MachinePlace, { run, record, liveness }: FoundRun): RunBusyError {
  const { holder, guard } = record ?? {};
  const who =
    liveness === "ending" && guard !== undefined
      ? `the guard of run ${run}, process ${guard.pid}, takes down what it left`
      : `run ${run} of process ${holder?.pid ?? "(unknown)"} works on it`;
  return new RunBusyError(`Cannot back up the machine at ${place.address}: ${who}`, {
    hint: "Wait until it has ended",
  });
}
