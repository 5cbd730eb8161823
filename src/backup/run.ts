import { availableParallelism } from "node:os";
import type { IoOptions } from "../bytes/index.js";
import { DamageError, messageOf, UsageError } from "../errors/index.js";
import { anySignal, step } from "../flow/index.js";
import { checkpointsOf, openMachine, recover, type MachineChoice, type QmpSource } from "../machine/index.js";
import { newPointId, repositoryTag } from "../point/index.js";
import {
  FencedError,
  requirePointText,
  standingPoints,
  type MachineLock,
  type PointManifest,
  type Repository,
} from "../repository/index.js";
import { StorageError } from "../storage/index.js";
import { connectionCount } from "./connections.js";
import { copyFrozen } from "./copy-frozen.js";
import { closePlans, planDisks, type DiskPlan } from "./disk-plan.js";
import { keepNewest } from "./keep-newest.js";
import { describePoint } from "./manifest.js";
import { newestIdOf, precedingPoint } from "./newest.js";
import { requireSense, sincePoint } from "./since.js";
import type { BackupObserver } from "./observer.js";
import { oddities } from "./oddities.js";
import { PointImages } from "./point-images.js";

/** Most workers that a backup uses by itself. */
const DEFAULT_WORKERS = 4;
/** zstd level. */
const DEFAULT_LEVEL = 3;

/** What to back up, where to, and how. */
export interface BackupOptions extends IoOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  readonly source: MachineChoice;
  /** All disks full. */
  readonly full?: boolean | undefined;
  /** All disks read in full, and what differs from the newest point stored, also where a bitmap is there. */
  readonly compare?: boolean | undefined;
  /**
   * A differential: every disk becomes an increment of this point (an id, a prefix of one, a name, `latest~N`), by its
   * checkpoint where that is kept, else compared with it.
   */
  readonly since?: string | undefined;
  /** How many checkpoints stay in the machine, this one's included, 1 to 16; default 1. */
  readonly keepCheckpoints?: number | undefined;
  /** A name for the point, unique within the machine, and words about it. */
  readonly name?: string | undefined;
  readonly description?: string | undefined;
  /** zstd level, 1 to 19; default 3. */
  readonly level?: number | undefined;
  /** Worker threads; default one a core, at most 4. */
  readonly workers?: number | undefined;
  /** Bytes a second read from the machine; default no limit. */
  readonly bandwidth?: number | undefined;
  readonly scratchDirectory?: string | undefined;
  /** Bytes. */
  readonly scratchLimit?: number | undefined;
  readonly socketDirectory?: string | undefined;
  readonly observer?: BackupObserver | undefined;
  /** Of this program, for the manifest. */
  readonly tidemarkVersion: string;
}

/**
 * Backs up a machine: freezes all its disks at one moment, copies what changed since the newest checkpoint
 * that can be trusted (per disk; else what differs from the newest point; else everything), and commits the point. When it fails, nothing is committed and
 * the machine is left as it was, its checkpoints included.
 *
 * @returns the new point
 * @throws {BusyError} when another run has the machine or its points
 * @throws {UsageError} for wrong options and disks that are not there, and when no disk can continue the point `since`
 * @throws {NotFoundError} when there is no point `since`
 */
export async function backup(options: BackupOptions): Promise<PointManifest> {
  const { repository, machine: name, source, signal } = options;
  requirePointText(options);
  requireSense(options);
  await using machine = await openMachine(source, { signal });
  // What a dead run left can hurt the guest: that goes whatever the repository says, or does not say.
  await recover(machine, { signal });
  await using lock = await repository.lockMachine(name, { signal });
  await step("repository locked");
  const io = { signal: anySignal(signal, lock.lost) };

  await repository.finishRewrites(name, { fence: () => lock.verify(io), ...io });
  await repository.collectGarbage(name, lock, io);
  const survey = await repository.survey(name, io);
  const { points, unreadable } = survey;
  requireFreeName(standingPoints(points), options.name);
  for (const { id, error } of unreadable) {
    options.observer?.warning?.(`Point ${id} is passed over, and what continues it: ${error.message}`);
  }
  const since = sincePoint(survey, options);
  await recover(machine, { checkpoints: checkpointsOf(repository, name, io), needed: since?.id, ...io });
  await step("cleaned");

  if (points.length === 0) await warnOfOtherName(machine.identity.uuid, options, io);

  const plans = await planDisks(machine, {
    ...{ repository, machine: name, points, full: options.full ?? false, compare: options.compare ?? false },
    since,
    warn: (message) => options.observer?.warning?.(message),
    ...io,
  });
  try {
    for (const plan of plans) options.observer?.disk?.(announce(plan));
    for (const message of oddities(plans, precedingPoint(plans, points)))
      options.observer?.warning?.(message);
    await step("planned");
    const point = await backupDisks(
      machine,
      lock,
      { plans, points, newestId: newestIdOf(survey) },
      { ...options, ...io },
    );
    await tidy("The machine's checkpoints may be lost", options.observer ?? {}, () => machine.close());
    return point;
  } finally {
    await closePlans(plans);
  }
}

/** What is to become a point. */
interface PointPlan {
  readonly plans: readonly DiskPlan[];
  /** All before it. */
  readonly points: readonly PointManifest[];
  /** The newest id of the machine, readable or not. */
  readonly newestId: string | undefined;
}

/** From the freeze to the commit. */
async function backupDisks(
  machine: QmpSource,
  lock: MachineLock,
  { plans, points, newestId }: PointPlan,
  options: BackupOptions & { readonly signal: AbortSignal },
): Promise<PointManifest> {
  const { repository, machine: name, observer = {}, signal } = options;
  const { level = DEFAULT_LEVEL, bandwidth = Infinity } = options;
  const workers = options.workers ?? Math.min(availableParallelism(), DEFAULT_WORKERS);
  const id = newPointId(new Date(), newestId);
  const frozen = await machine.freeze(
    {
      checkpoint: id,
      repositoryTag: repositoryTag(repository.id),
      disks: plans.map((plan) => ({ ...plan, base: plan.base?.bitmap })),
      scratchDirectory: options.scratchDirectory,
      scratchLimit: options.scratchLimit,
      socketDirectory: options.socketDirectory,
      maxConnections: connectionCount(plans, workers),
      warn: (message) => observer.warning?.(message),
    },
    { signal },
  );
  const images = new PointImages(repository, name, id);
  let isCommitting = false;
  try {
    const copied = await copyFrozen(frozen, plans, images, { signal, workers, level, bandwidth, observer });
    const disks = await images.finish(copied);
    await step("images finished");
    const { identity } = machine;
    const { keepCheckpoints = 1 } = options;
    const parent = precedingPoint(plans, points)?.id ?? null;
    const facts = { ...options, keepCheckpoints, id, machine: name, identity, frozen, parent };
    const manifest = describePoint(facts, disks);
    isCommitting = true;
    await repository.commitPoint(manifest, { fence: () => lock.verify({ signal }), signal });
    await step("committed");
    await tidy(
      "The point is stored; older checkpoints stay in the machine until the next run",
      observer,
      () => keepNewest(frozen, [...points, manifest], { repository, machine: name, identity }, { signal }),
    );
    await step("bitmaps removed");
    return manifest;
  } catch (error) {
    await tidy("Bitmaps of this run stay in the machine until the next one", observer, () =>
      frozen.drop({ keepCheckpoint: isCommitting }),
    );
    await tidy("Unfinished images stay in the repository until the next run", observer, () =>
      images.discard(),
    );
    if (error instanceof StorageError || error instanceof DamageError) await assertHeld(lock);
    throw error;
  }
}

/**
 * Whoever took the lock over may have removed files under this run's hands: then that is what happened to it.
 *
 * @throws {FencedError} when the lock is lost
 */
async function assertHeld(lock: MachineLock): Promise<void> {
  try {
    await lock.verify();
  } catch (error) {
    if (error instanceof FencedError) throw error;
  }
}

/** Does what may fail without changing how the backup ends; the next run does it again. */
async function tidy(what: string, observer: BackupObserver, action: () => Promise<void>): Promise<void> {
  try {
    await action();
  } catch (error) {
    observer.warning?.(`${what}: ${messageOf(error)}`);
  }
}

function requireFreeName(points: readonly PointManifest[], name: string | undefined): void {
  const holder = name === undefined ? undefined : points.find((point) => point.name === name);
  if (holder === undefined) return;
  throw new UsageError(`Point ${holder.id} has the name ${JSON.stringify(name)} already`, {
    hint: "Choose another name",
  });
}

/** A mistyped name makes a new machine, and everything full. */
async function warnOfOtherName(
  uuid: string | null,
  { repository, machine, observer }: BackupOptions,
  io: IoOptions,
): Promise<void> {
  if (uuid === null || observer?.warning === undefined) return;
  for (const other of await repository.machines(io)) {
    if (other === machine) continue;
    const { points } = await repository.survey(other, io);
    if (points.at(-1)?.machine.uuid !== uuid) continue;
    const what = `The repository has points of this machine (UUID ${uuid}) under the name "${other}"`;
    observer.warning(`${what}: "${machine}" begins a new chain`);
  }
}

function announce({ name, base, reason }: DiskPlan): {
  name: string;
  kind: "full" | "incremental";
  reason: string | null;
} {
  return { name, kind: base === undefined ? "full" : "incremental", reason };
}
