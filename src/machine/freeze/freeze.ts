import { messageOf } from "../../errors/index.js";
import { step } from "../../flow/index.js";
import { formatBitmapName, formatRunObject } from "../../point/index.js";
import type { QmpAddress, QmpClient } from "../../qmp/index.js";
import { TeardownError } from "../errors.js";
import { assertChainsUnchanged, type Look } from "./chains.js";
import { exportDisk, prepareSocketPath, startServer } from "./export.js";
import { QemuFrozenPoint } from "./frozen-point.js";
import type { Protection } from "../guard/protection.js";
import { reach } from "../teardown/reach.js";
import { overlaysOn } from "../checkpoints/overlays.js";
import { assertDisksUnchanged } from "../discover/readiness.js";
import type { Run } from "../run/run.js";
import { ScratchLimit } from "./scratch-limit.js";
import { createScratch, placeScratch, type Scratch } from "./scratch.js";
import { removeStaleScratch } from "./stale-scratch.js";
import type { FreezeRequest, FrozenDisk, FrozenPoint } from "../source.js";
import { removeBitmaps, tearDown } from "../teardown/teardown.js";
import { freezeActions } from "./transaction.js";
import { Watchdog } from "./watchdog.js";

/** How long the transaction may take, in milliseconds: it waits for the disks' requests in flight. */
const TRANSACTION_DEADLINE = 120_000;

/** What a freeze works with: a live machine, or a daemon that has the images of one that is off. */
export interface Freeze {
  readonly qmp: QmpClient;
  readonly address: QmpAddress;
  readonly run: Run;
  /** What ends the run if this process dies; undefined for one whose machine dies with it. */
  readonly guard?: Protection | undefined;
  readonly request: FreezeRequest;
  /** The disks that can be frozen, and the machine's state, asked anew. */
  readonly look: Look;
  readonly signal?: AbortSignal | undefined;
  /** Called when nothing is frozen any more. @param isClean nothing of the run is left */
  readonly onEnd: (isClean: boolean) => void;
}

/** How far a freeze has come: what an undo has to know beyond what QEMU tells. */
interface Progress {
  socketPath: string | null;
  files: readonly string[];
  isFrozen: boolean;
}

/**
 * Freezes all disks of a request in one transaction and serves them. What can be prepared is prepared before,
 * so that the frozen moment is one round trip. When anything fails, everything is undone.
 */
export async function freezeDisks(freeze: Freeze): Promise<FrozenPoint> {
  const progress: Progress = { socketPath: null, files: [], isFrozen: false };
  let watchdog: Watchdog | undefined;
  try {
    const scratch = await prepare(freeze, progress);
    const limit = await armLimit(freeze, scratch);
    freeze.guard?.watch(limit.bounds);
    await step("scratch watched");
    // A scratch node keeps its disk's node from being resized, and from getting a snapshot on top: now it stays.
    const { disks: now, state } = await freeze.look({ signal: freeze.signal });
    assertDisksUnchanged(freeze.request.disks, now);
    // From here on no event may be missed.
    watchdog = Watchdog.start(freeze.qmp, freeze.run.id, freeze.request.disks, limit);
    const frozenAt = await transact(freeze, progress);
    // A job that began before the watch would show now, one that begins later is seen.
    await assertChainsUnchanged(freeze.request, freeze.look, { signal: freeze.signal });
    const disks = await serve(freeze, progress);
    await step("exported");
    return new QemuFrozenPoint({ ...freeze, watchdog, disks, frozenAt, state, plan: { ...progress } });
  } catch (error) {
    watchdog?.stop();
    throw await undo(freeze, progress, error);
  }
}

async function prepare(
  { qmp, address, run, request, signal }: Freeze,
  progress: Progress,
): Promise<readonly Scratch[]> {
  const scratch = await placeScratch(request, run.id);
  await removeStaleScratch(scratch, run.directory).catch((error: unknown) => {
    request.warn?.(`Old scratch files stay: ${messageOf(error)}`);
  });
  const socketPath = await prepareSocketPath(run.id, address, request.socketDirectory);
  progress.socketPath = socketPath;
  progress.files = scratch.map(({ file }) => file);
  run.plan({ server: socketPath, files: progress.files });
  await step("scratch planned");
  for (const item of scratch) await createScratch(qmp, run.id, item, { signal });
  await step("scratch made");
  // Before the freeze, so that another program's server is found while nothing is frozen; after the scratch
  // nodes, whose presence tells a teardown that the server is ours.
  await startServer(qmp, socketPath, request.maxConnections);
  await step("server started");
  return scratch;
}

function armLimit({ qmp, run, request, signal }: Freeze, scratch: readonly Scratch[]): Promise<ScratchLimit> {
  return ScratchLimit.arm(qmp, run.id, scratch, request.scratchLimit, { signal });
}

async function transact({ qmp, run, request, signal }: Freeze, progress: Progress): Promise<Date> {
  await request.beforeFreeze?.();
  signal?.throwIfAborted();
  await step("before the freeze");
  // No signal: once it is sent, whether it happened must be known.
  progress.isFrozen = true;
  await qmp.execute(
    "transaction",
    { actions: freezeActions(request, run.id) },
    { timeoutMs: TRANSACTION_DEADLINE },
  );
  const frozenAt = new Date();
  await request.onFrozen?.();
  await step("frozen");
  return frozenAt;
}

async function serve({ qmp, run, request, signal }: Freeze, progress: Progress): Promise<FrozenDisk[]> {
  const path = progress.socketPath ?? "";
  const { repositoryTag: repository, checkpoint } = request;
  const disks: FrozenDisk[] = [];
  for (const [number, { disk, token, base }] of request.disks.entries()) {
    const overlays = base === undefined ? 0 : overlaysOn(disk, base.node);
    if (overlays === undefined) throw new RangeError(`disk ${disk.name} has no node "${base?.node ?? ""}"`);
    const context = { hasChanges: base !== undefined, hasOverlays: overlays > 0 };
    const exported = await exportDisk(qmp, run.id, number, context, { signal });
    disks.push({
      disk,
      token,
      virtualSize: disk.virtualSize,
      socket: { transport: "unix", path },
      ...exported,
      // The scratch is on top of them.
      overlayDepth: overlays === 0 ? undefined : 1 + overlays,
      bitmap: formatBitmapName({ repository, checkpoint, token }),
    });
  }
  return disks;
}

/** Undoes a freeze that failed, new bitmaps included: nothing was read from it. @returns what to throw */
async function undo(freeze: Freeze, progress: Progress, error: unknown): Promise<unknown> {
  const { qmp, address, run, guard, request, onEnd } = freeze;
  guard?.ending();
  try {
    await using reached = await reach(qmp, address);
    const { socketPath, files } = progress;
    await tearDown(reached.qmp, { run: run.id, socketPath, files });
    // Its file system may stay full: that is no longer this run's doing.
    guard?.watch([]);
    if (progress.isFrozen && reached.qmp !== undefined) {
      const { repositoryTag: repository, checkpoint } = request;
      const made = request.disks.flatMap(({ disk: { node }, token }, number) => [
        { node, name: formatBitmapName({ repository, checkpoint, token }) },
        { node, name: formatRunObject({ run: run.id, disk: number, kind: "tmp" }) },
      ]);
      await removeBitmaps(reached.qmp, made);
    }
    onEnd(true);
    return error;
  } catch (problem) {
    onEnd(false);
    const problems = problem instanceof TeardownError ? problem.problems : [String(problem)];
    return new TeardownError(run.id, [`the freeze failed: ${String(error)}`, ...problems], error);
  }
}
