import { renameSync, rmSync, writeFileSync } from "node:fs";
import { readdir, readFile, stat } from "node:fs/promises";
import { basename, isAbsolute, join } from "node:path";
import { TidemarkError } from "../../errors/index.js";
import { parseRunObject } from "../../point/index.js";
import { judgeOnThisHost, thisProcess, type ProcessIdentity } from "../../process/index.js";

/**
 * What a run writes down about itself, in `<run directory>/<run id>.json`, before it makes anything: whoever
 * finds its things later learns from it whether the run still lives and what it made outside of QEMU.
 */
export interface RunRecord {
  readonly version: 1;
  readonly run: string;
  readonly holder: ProcessIdentity;
  /** The process that ends the run if its holder dies, once there is one. */
  readonly guard?: ProcessIdentity | undefined;
  readonly machine: MachinePlace;
  /** Path of the NBD socket, once it may have been made. */
  readonly server: string | null;
  /** Scratch files that may have been made. */
  readonly files: readonly string[];
}

/** Where a machine is on this host. */
export interface MachinePlace {
  /** As the run was told: the monitor, or the images. */
  readonly address: string;
  /** What tells it from others, whatever it is called; null when that could not be found out. */
  readonly key: string | null;
}

/** A record that was found. */
export interface FoundRun {
  readonly run: string;
  /** undefined: it cannot be understood, and belongs to a dead run. */
  readonly record: RunRecord | undefined;
  /** "ending": its holder is dead, and its guard takes down what it left. */
  readonly liveness: "alive" | "ending" | "dead";
}

/** A run refreshes its record this often, in milliseconds … */
export const HEARTBEAT = 10_000;
/** … and one of another pid namespace, or with a damaged record, counts as dead after this long without. */
const SILENCE = 60_000;

const RUN_FILE = /^([0-9a-f]{8})\.json$/;

/**
 * Writes a record, visible at once or not at all. By this thread, as `removeRecord`: those that Node has for files may
 * all wait for a repository that does not answer, and a machine is freed all the same.
 */
export function writeRecord(directory: string, record: RunRecord): void {
  const path = pathOf(directory, record.run);
  writeFileSync(`${path}.new`, JSON.stringify(record), { mode: 0o600 });
  renameSync(`${path}.new`, path);
}

export function removeRecord(directory: string, run: string): void {
  rmSync(pathOf(directory, run), { force: true });
}

/**
 * All records of a run directory, each judged. None when there is no such directory yet.
 *
 * @throws {TidemarkError} TM_RUN_RECORD when one cannot be understood and is fresh: its run may be alive
 */
export async function readRecords(directory: string): Promise<FoundRun[]> {
  const names = await namesIn(directory);
  const found = await Promise.all(
    names.filter((name) => RUN_FILE.test(name)).map((name) => readRecord(join(directory, name))),
  );
  return found.filter((run) => run !== undefined);
}

/** Path of a run's record. */
export function pathOf(directory: string, run: string): string {
  return join(directory, `${run}.json`);
}

/** Directory of a run's storage daemon. */
export function daemonDirectoryOf(directory: string, run: string): string {
  return join(directory, `${run}.daemon`);
}

/** One run's record; undefined when it has none (any more). @throws as `readRecords` */
export async function findRecord(directory: string, run: string): Promise<FoundRun | undefined> {
  return await readRecord(pathOf(directory, run));
}

async function namesIn(directory: string): Promise<string[]> {
  try {
    return await readdir(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return [];
    throw error;
  }
}

async function readRecord(path: string): Promise<FoundRun | undefined> {
  let text: string;
  let heartbeat: number;
  try {
    [text, { mtimeMs: heartbeat }] = await Promise.all([readFile(path, "utf8"), stat(path)]);
  } catch (error) {
    // Removed since the directory was listed: that run has ended.
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
  const run = basename(path, ".json");
  const isSilent = Date.now() - heartbeat > SILENCE;
  const record = parseRecord(path, text);
  if (record instanceof Error) {
    if (!isSilent) throw record;
    return { run, record: undefined, liveness: "dead" };
  }
  const here = await thisProcess();
  const holder = await judgeOnThisHost(record.holder, here);
  if (holder === "alive") return { run, record, liveness: "alive" };
  if (holder === "gone") {
    const guard = record.guard === undefined ? "gone" : await judgeOnThisHost(record.guard, here);
    return { run, record, liveness: guard === "gone" ? "dead" : "ending" };
  }
  return { run, record, liveness: isSilent ? "dead" : "alive" };
}

/** The record, or what is wrong with it. */
function parseRecord(path: string, text: string): RunRecord | TidemarkError {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    return unreadable(path, "it is not JSON", cause);
  }
  if (!isRecord(value) || `${value.run}.json` !== basename(path)) {
    return unreadable(path, "it does not describe the run of its name");
  }
  for (const file of value.files) {
    if (!isScratchFile(file, value.run))
      return unreadable(path, `it lists ${file}, which is no scratch file`);
  }
  return value;
}

/** Only such files are ever deleted on a record's word: a record could be forged or damaged. */
function isScratchFile(file: string, run: string): boolean {
  const name = basename(file, ".qcow2");
  return isAbsolute(file) && parseRunObject(name)?.run === run && parseRunObject(name)?.kind === "scr";
}

function isRecord(value: unknown): value is RunRecord {
  const record = value as Partial<RunRecord> | null;
  const { holder, guard, machine, server, files } = record ?? {};
  return (
    record?.version === 1 &&
    typeof record.run === "string" &&
    isProcess(holder) &&
    (guard === undefined || isProcess(guard)) &&
    typeof machine?.address === "string" &&
    (machine.key === null || typeof machine.key === "string") &&
    (server === null || typeof server === "string") &&
    Array.isArray(files) &&
    files.every((file) => typeof file === "string")
  );
}

function isProcess(value: ProcessIdentity | undefined): boolean {
  if (typeof value?.pid !== "number") return false;
  const { startTime, bootId, pidNamespace } = value;
  return [startTime, bootId, pidNamespace].every((field) => field === null || typeof field === "string");
}

function unreadable(path: string, why: string, cause?: unknown): TidemarkError {
  return new TidemarkError("TM_RUN_RECORD", `Cannot read the state file of a run, ${path}: ${why}`, {
    cause,
    hint: "Try again in a minute: a run that gives no sign of life meanwhile counts as dead",
  });
}
