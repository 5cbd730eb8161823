import { Socket } from "node:net";
import { BusyError, ConnectionError } from "../../errors/index.js";
import { DeadlineError, pause, step } from "../../flow/index.js";
import { thisProcess } from "../../process/index.js";
import { QmpClient } from "../../qmp/index.js";
import { TeardownError } from "../errors.js";
import { endRun } from "../teardown/end-run.js";
import { objectsOf, takeInventory } from "../run/leftovers.js";
import { reach, type Reached } from "../teardown/reach.js";
import { findRecord, writeRecord } from "../run/run-record.js";
import { deleteExports } from "../teardown/teardown.js";
import type { HeldConnections } from "./held-connections.js";
import { closed, say, type HoldOrder } from "./orders.js";

/** Pauses between tries, in milliseconds; the last one is repeated. */
const PAUSES = [100, 300, 1000, 3000] as const;
/** How often a teardown is tried once the exports are gone, or when nobody answers for QEMU. */
const TRIES = 6;
/** How long the guard that was to be relieved may take to leave, in milliseconds. */
const RELIEF_DEADLINE = 2000;

/**
 * Ends the run of an agent that died: over its own connection to the monitor, behind every command that it may
 * have sent, with the same teardown that the agent would have done. The NBD connections stay open until QEMU has
 * deleted their exports, however long that takes.
 *
 * @throws {TeardownError | ConnectionError} when something is left after several tries; the run's record stays, for the next run
 */
export async function takeOver(order: HoldOrder, connections: HeldConnections): Promise<void> {
  connections.drain();
  await claim(order);
  await dismissPrevious(order.previous);
  await step("guard takes over");
  const adopted = await adopt(order);
  let exportsAreGone = false;
  let tries = 0;
  for (let attempt = 0; ; attempt += 1) {
    try {
      await using reached = await reachPatiently(adopted, order);
      if (reached.qmp !== undefined) await deleteExports(reached.qmp, order.run);
      exportsAreGone = true;
      await end(reached.qmp, order, connections);
      break;
    } catch (error) {
      // Letting go while QEMU still serves them could abort the machine, and a QEMU that is silent may be so for long (its
      // host was suspended, its storage hangs) and go on: then it is insisted on.
      if (error instanceof ConnectionError || (exportsAreGone && !isSilence(error))) tries += 1;
      if (tries === TRIES) throw error;
    }
    await pauseAfter(attempt);
  }
  // The agent may still have its end, see hold(): closing this one would not free the monitor.
  await adopted?.hangUp();
}

/** Says in the run's record that it is this guard that ends it: the agent may have died before it had written that. */
async function claim({ run, runDirectory }: HoldOrder): Promise<void> {
  const guard = await thisProcess();
  const record = (await findRecord(runDirectory, run).catch(() => undefined))?.record;
  if (record === undefined || record.guard?.pid === guard.pid) return;
  // Without room for it the run is ended all the same, perhaps side by side with the next one's clean-up.
  try {
    writeRecord(runDirectory, { ...record, guard });
  } catch (error) {
    if (!(error instanceof Error && "syscall" in error)) throw error;
  }
}

/** Whether QEMU did not answer in time. */
function isSilence(error: unknown): boolean {
  return error instanceof DeadlineError || (error instanceof TeardownError && isSilence(error.cause));
}

async function end(
  qmp: QmpClient | undefined,
  { run, runDirectory: directory }: HoldOrder,
  connections: HeldConnections,
): Promise<void> {
  const found = await findRecord(directory, run);
  const bitmaps = qmp === undefined ? [] : objectsOf(await takeInventory(qmp), run).bitmaps;
  const closeConnections = (): Promise<void> => {
    connections.close();
    return Promise.resolve();
  };
  await endRun(qmp, { run, directory, record: found?.record, bitmaps, closeConnections });
}

/**
 * The agent died while this guard took another one's place: that one lets go first, so that no handshake is under
 * way when the server is stopped.
 */
async function dismissPrevious(descriptor: number | null): Promise<void> {
  if (descriptor === null) return;
  const previous = new Socket({ fd: descriptor, readable: true, writable: true });
  const gone = closed(previous.resume());
  say(previous, { order: "done" });
  const timer = setTimeout(() => previous.destroy(), RELIEF_DEADLINE);
  await gone;
  clearTimeout(timer);
}

/** The agent's connection to the monitor; undefined when it is dead: QEMU has ended, or hung up on the agent. */
async function adopt({ address, qmp }: HoldOrder): Promise<QmpClient | undefined> {
  if (qmp === null) return undefined;
  try {
    return await QmpClient.adopt(address, new Socket({ fd: qmp, readable: true, writable: true }));
  } catch (error) {
    if (!(error instanceof ConnectionError)) throw error;
    return undefined;
  }
}

/** Waits for the monitor as long as another client has it. */
async function reachPatiently(qmp: QmpClient | undefined, { address }: HoldOrder): Promise<Reached> {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await reach(qmp, address);
    } catch (error) {
      if (!(error instanceof BusyError)) throw error;
    }
    await pauseAfter(attempt);
  }
}

function pauseAfter(attempt: number): Promise<void> {
  return pause(PAUSES[Math.min(attempt, PAUSES.length - 1)] ?? 0);
}
