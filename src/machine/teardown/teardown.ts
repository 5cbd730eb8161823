import { rmSync } from "node:fs";
import { messageOf } from "../../errors/index.js";
import { step } from "../../flow/index.js";
import { QmpCommandError, type QmpClient } from "../../qmp/index.js";
import { TeardownError } from "../errors.js";
import { isListening, removeSocketPath } from "../freeze/export.js";
import { waitConcluded, watchJob } from "./jobs.js";
import { objectsOf, takeInventory } from "../run/leftovers.js";

/** How long QEMU may take to end an export, in milliseconds: it waits for the requests in flight. */
const EXPORT_DEADLINE = 60_000;

/** Where a bitmap is. */
export interface BitmapPlace {
  readonly node: string;
  readonly name: string;
}

/** What is taken down. */
export interface TeardownPlan {
  readonly run: string;
  /** Scratch files that the run may have made. */
  readonly files: readonly string[];
  /** Path of the NBD socket that the run may have made. A server that listens there is the run's. */
  readonly socketPath: string | null;
  /** The run had a server at a place that nobody knows any more: whatever server there is, is the run's. */
  readonly stopAnyServer?: boolean | undefined;
  /** Closes every NBD connection that this process has. Called only when the exports are gone, or QEMU is. */
  readonly closeConnections?: (() => Promise<void>) | undefined;
}

/**
 * Takes down everything that a run has in QEMU, and its files; bitmaps stay. What is there is asked for, so
 * it works at whatever step a run ended.
 *
 * The order is the one that no known QEMU dies of: exports are deleted hard, which disconnects clients from
 * inside; only then are sockets closed (a client that goes first from a disk in an iothread aborts QEMU
 * 7.2); then the server, when no handshake can be under way (stopping it during one hangs QEMU); then jobs,
 * and nodes from the top. The nodes come last because they show that a server at the run's socket is this
 * QEMU's: a run makes them before it starts its server, so wherever it died, both are there or no server is.
 *
 * Files are deleted by this thread: those that Node has for files may all wait for a repository that does not answer.
 *
 * A step that fails does not keep the others from being done, but while QEMU may still serve an export, connections
 * stay open and the server stays up.
 *
 * @param qmp undefined when QEMU is gone: then only connections and files are left to end
 * @throws {TeardownError} listing what failed
 */
export async function tearDown(qmp: QmpClient | undefined, plan: TeardownPlan): Promise<void> {
  const steps = new Steps();
  const deleted =
    qmp === undefined || (await steps.try("delete exports", () => deleteExports(qmp, plan.run)));
  await step("exports deleted");
  const closed = deleted && (await steps.try("close NBD connections", async () => plan.closeConnections?.()));
  await step("connections closed");
  const files = new Set(plan.files);
  let stopped = closed;
  if (qmp !== undefined) {
    stopped &&= await steps.try("stop the NBD server", () => stopServer(qmp, plan));
    await step("server stopped");
    await steps.try("end jobs", () => endJobs(qmp, plan.run));
    await step("jobs ended");
    if (stopped) {
      await steps.try("delete nodes", async () => {
        for (const file of await deleteNodes(qmp, plan.run)) files.add(file);
      });
    }
  }
  await step("nodes deleted");
  for (const file of files) await steps.try(`delete ${file}`, () => rmSync(file, { force: true }));
  const { socketPath } = plan;
  // A server that still runs is known by its socket, to whoever goes on with this.
  if (stopped && socketPath !== null)
    await steps.try(`delete ${socketPath}`, () => removeSocketPath(socketPath));
  await step("files deleted");
  steps.finish(plan.run);
}

/** How often bitmaps are tried to be removed while what is there changes with each refusal. */
const REMOVAL_ATTEMPTS = 8;

/**
 * Removes bitmaps, all or none. Those that are gone, in use, or stored in an image that is read-only now (somebody took
 * an external snapshot) are left out: QEMU refuses, and one refusal would keep all the others. A disk may go while it is
 * looked, so after a refusal it is looked again.
 *
 * @throws {QmpCommandError} when QEMU refuses, and what is there has not changed
 */
export async function removeBitmaps(qmp: QmpClient, wanted: readonly BitmapPlace[]): Promise<void> {
  let refused: { readonly removals: readonly BitmapPlace[]; readonly error: QmpCommandError } | undefined;
  for (let attempt = 0; attempt < REMOVAL_ATTEMPTS; attempt += 1) {
    const removals = await removableOf(qmp, wanted);
    if (removals.length === 0) return;
    if (refused?.removals.length === removals.length) break;
    try {
      const actions = removals.map(
        ({ node, name }) => ({ type: "block-dirty-bitmap-remove", data: { node, name } }) as const,
      );
      await qmp.execute("transaction", { actions });
      return;
    } catch (error) {
      if (!(error instanceof QmpCommandError)) throw error;
      refused = { removals, error };
    }
  }
  if (refused !== undefined) throw refused.error;
}

async function removableOf(qmp: QmpClient, wanted: readonly BitmapPlace[]): Promise<readonly BitmapPlace[]> {
  const nodes = await qmp.execute("query-named-block-nodes", { flat: true });
  return wanted.filter(({ node, name }) => {
    const holder = nodes.find((item) => item.name === node);
    const bitmap = holder?.bitmaps.find((item) => item.name === name);
    if (holder === undefined || bitmap === undefined) return false;
    return !bitmap.busy && !(holder.readOnly && bitmap.persistent);
  });
}

/** Deletes a run's exports, which disconnects all their clients, and waits until they are gone. */
export async function deleteExports(qmp: QmpClient, run: string): Promise<void> {
  const { exports } = objectsOf(await takeInventory(qmp), run);
  using watch = qmp.watch(
    ({ name, data }) => name === "BLOCK_EXPORT_DELETED" && exports.includes(String(data["id"])),
  );
  await settleAll(
    exports.map((id) => qmp.execute("block-export-del", { id, mode: "hard" })),
    // Refused because it is being deleted already? Then it will be gone below.
    async () => (await present(qmp, exports)).some(({ shuttingDown }) => !shuttingDown),
  );
  const started = Date.now();
  while ((await present(qmp, exports)).length > 0) {
    await watch.next({ timeoutMs: Math.max(1, started + EXPORT_DEADLINE - Date.now()) });
  }
}

async function present(qmp: QmpClient, ids: readonly string[]): Promise<{ shuttingDown: boolean }[]> {
  return (await qmp.execute("query-block-exports")).filter(({ id }) => ids.includes(id));
}

/** A fleecing job never completes: cancelling is its normal end. */
async function endJobs(qmp: QmpClient, run: string): Promise<void> {
  const { jobs } = objectsOf(await takeInventory(qmp), run);
  await Promise.all(jobs.map((id) => endJob(qmp, id)));
}

async function endJob(qmp: QmpClient, id: string): Promise<void> {
  using watch = watchJob(qmp, id);
  await settleAll([qmp.execute("job-cancel", { id })], async () => {
    // One that has ended, or that cannot be cancelled but soon ends (creating an image), refuses: fine.
    const job = (await qmp.execute("query-jobs")).find((item) => item.id === id);
    return job !== undefined && job.type === "backup" && job.status !== "concluded";
  });
  await waitConcluded(qmp, id, watch);
  await settleAll([qmp.execute("job-dismiss", { id })], async () =>
    (await qmp.execute("query-jobs")).some((item) => item.id === id),
  );
}

/** @returns the files of the deleted nodes */
async function deleteNodes(qmp: QmpClient, run: string): Promise<readonly string[]> {
  const { nodes, files } = objectsOf(await takeInventory(qmp), run);
  for (const node of nodes) {
    await settleAll([qmp.execute("blockdev-del", { "node-name": node })], async () =>
      objectsOf(await takeInventory(qmp), run).nodes.includes(node),
    );
  }
  return files;
}

/**
 * Stops the NBD server if it is the run's: it listens at the run's socket, and this QEMU has the run's nodes
 * (the one that listens could be another, once started at the same address). Every connection of ours is closed, but QEMU may not have seen it
 * yet. Its main loop takes what happened on all sockets in one round, the monitor's included: after some
 * answers from the monitor it has.
 */
async function stopServer(
  qmp: QmpClient,
  { run, socketPath, stopAnyServer = false }: TeardownPlan,
): Promise<void> {
  if (!stopAnyServer) {
    if (socketPath === null || !(await isListening(socketPath))) return;
    if (objectsOf(await takeInventory(qmp), run).nodes.length === 0) return;
  }
  for (let round = 0; round < 4; round += 1) await qmp.execute("query-version");
  try {
    await qmp.execute("nbd-server-stop");
  } catch (error) {
    // Whether there is one at all cannot be asked.
    if (!(stopAnyServer && error instanceof QmpCommandError)) throw error;
  }
}

/** Waits for all; what failed matters only when the state says that something is still there. */
async function settleAll(
  commands: readonly Promise<unknown>[],
  isStillThere: () => Promise<boolean>,
): Promise<void> {
  const failed = (await Promise.allSettled(commands)).find((result) => result.status === "rejected");
  if (failed !== undefined && (await isStillThere())) throw failed.reason;
}

/** Does steps one after another and remembers which failed. */
class Steps {
  readonly #problems: string[] = [];
  #cause: unknown;

  async try(what: string, step: () => unknown): Promise<boolean> {
    try {
      await step();
      return true;
    } catch (error) {
      this.#problems.push(`${what}: ${messageOf(error)}`);
      this.#cause ??= error;
      return false;
    }
  }

  finish(run: string): void {
    if (this.#problems.length > 0) throw new TeardownError(run, this.#problems, this.#cause);
  }
}
