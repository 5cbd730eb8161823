import { rm } from "node:fs/promises";
import type { QmpClient } from "../../qmp/index.js";
import { isSocketPath } from "../freeze/export.js";
import { daemonDirectoryOf, pathOf, removeRecord, type RunRecord } from "../run/run-record.js";
import { removeBitmaps, tearDown } from "./teardown.js";

/** What is left of a run whose process is dead. */
export interface RunRemains {
  readonly run: string;
  /** The run directory. */
  readonly directory: string;
  /** What the run wrote down about itself; undefined when nothing is there. */
  readonly record: RunRecord | undefined;
  /** Its transient bitmaps. */
  readonly bitmaps: readonly { readonly node: string; readonly name: string }[];
  /** See `TeardownPlan`. */
  readonly stopAnyServer?: boolean | undefined;
  /** Closes the NBD connections that this process has of the run. */
  readonly closeConnections?: (() => Promise<void>) | undefined;
}

/**
 * Ends a dead run: takes down what it has in QEMU and beside it, its transient bitmaps, and last its record.
 * Checkpoints' bitmaps stay: the repository decides about them.
 *
 * @param qmp undefined when QEMU is gone
 * @throws {TeardownError} when something is left; the record stays then
 */
export async function endRun(qmp: QmpClient | undefined, remains: RunRemains): Promise<void> {
  const { run, directory, record, bitmaps, stopAnyServer, closeConnections } = remains;
  const server = record?.server ?? null;
  await tearDown(qmp, {
    run,
    files: record?.files ?? [],
    socketPath: server !== null && isSocketPath(server, run) ? server : null,
    stopAnyServer,
    closeConnections,
  });
  if (qmp !== undefined) await removeBitmaps(qmp, bitmaps);
  // Its storage daemon, if it had one, has ended: the kernel saw to that.
  await rm(daemonDirectoryOf(directory, run), { recursive: true, force: true });
  removeRecord(directory, run);
  await rm(`${pathOf(directory, run)}.new`, { force: true });
}
