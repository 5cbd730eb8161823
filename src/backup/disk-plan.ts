import type { IoOptions } from "../bytes/index.js";
import { DamageError, UsageError } from "../errors/index.js";
import {
  baseContextOf,
  checkpointsOf,
  chooseBases,
  chooseComparisons,
  nameDisks,
  type BaseChoice,
  type DiskDecision,
  type FreezeBase,
  type MachineSource,
  type SourceDisk,
} from "../machine/index.js";
import { newHashKey } from "../hashes/index.js";
import { newDiskToken } from "../point/index.js";
import { DEFAULT_CLUSTER_SIZE } from "../qcow2/index.js";
import type { PointChain, PointHashes, PointManifest, Repository } from "../repository/index.js";

/** What an increment continues. */
export interface Base {
  /** The bitmap that recorded since then; undefined: none did, the disk is compared. */
  readonly bitmap: FreezeBase | undefined;
  /** How many images lie on top of the one that has it. */
  readonly overlays: number;
  /** What the parent's disk holds, where the disk is compared with it. */
  readonly hashes: PointHashes | undefined;
  /** Id of the checkpoint, and of its point. */
  readonly checkpoint: string;
  readonly parentVirtualSize: number;
  /** The parent's disk, opened: its tables say where it holds data. */
  readonly chain: PointChain;
}

/** What a backup does with one disk. */
export interface DiskPlan {
  readonly disk: SourceDisk;
  /** The disk's name in the new point. */
  readonly name: string;
  readonly token: string;
  readonly clusterSize: number;
  /** Undefined: full. */
  readonly base: Base | undefined;
  /** Id of the point that the disk's content comes from, as far as that is known: also of one that goes full. */
  readonly continues: string | undefined;
  /** Key of the hashes of what is stored: the parent's, or a new one. Undefined: none are made, the parent has none. */
  readonly hashKey: Buffer | undefined;
  /** Why it is full, or compared; null for an increment by a bitmap. */
  readonly reason: string | null;
}

/** What the choice of bases depends on. */
export interface PlanContext extends IoOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  /** The machine's points, oldest first. */
  readonly points: readonly PointManifest[];
  /** All disks full, because the user wants it. */
  readonly full: boolean;
  /** Takes warnings for the user. */
  readonly warn: (message: string) => void;
  /** All disks compared, those that have a bitmap too. */
  readonly compare: boolean;
  /** The point that every disk is to be an increment of; default the newest that it can be. */
  readonly since?: PointManifest | undefined;
}

/**
 * Decides for each disk: an increment of the newest checkpoint that can be trusted; else what differs from the newest
 * point that holds it; else full, and why. With `since` that is the only point to continue.
 *
 * @throws {UsageError} when no disk can continue `since`
 */
export async function planDisks(source: MachineSource, context: PlanContext): Promise<DiskPlan[]> {
  const choices = await chooseAll(source, context);
  const decisions = context.full ? choices : compareRest(source, choices, context);
  if (context.since !== undefined) explainStrangers(decisions, context.since);
  const names = nameDisks(source.disks, decisions);
  const plans: DiskPlan[] = [];
  try {
    for (const disk of source.disks) {
      const choice: DiskDecision = decisions.get(disk) ?? {
        kind: "full",
        reason: "first backup of this disk",
      };
      plans.push(await planDisk(disk, names.get(disk) ?? disk.name, choice, context));
    }
    if (context.since !== undefined) requireDifferential(plans, context.since);
    return plans;
  } catch (error) {
    await closePlans(plans);
    throw error;
  }
}

async function chooseAll(
  source: MachineSource,
  { repository, machine, points, since, signal }: PlanContext,
): Promise<Map<SourceDisk, BaseChoice>> {
  const checkpoints = checkpointsOf(repository, machine, { signal });
  const facts = { points, clusterSize: DEFAULT_CLUSTER_SIZE };
  const context = baseContextOf(checkpoints, source.identity, facts);
  return await chooseBases(source.disks, { ...context, since: since?.id });
}

/** A disk that the point does not hold has lost nothing. */
function explainStrangers(decisions: Map<SourceDisk, DiskDecision>, since: PointManifest): void {
  for (const [disk, choice] of decisions) {
    if (choice.kind !== "full") continue;
    const isHeld = since.disks.some(({ name, token }) =>
      choice.token === undefined ? name === disk.name : token === choice.token,
    );
    if (!isHeld) decisions.set(disk, { ...choice, reason: `point ${since.id} does not hold this disk` });
  }
}

function requireDifferential(plans: readonly DiskPlan[], since: PointManifest): void {
  if (plans.some(({ base }) => base !== undefined)) return;
  const reasons = plans.map(({ name, reason }) => `disk "${name}": ${reason ?? "full"}`).join("; ");
  throw new UsageError(`Cannot make a backup since point ${since.id}: no disk can continue it (${reasons})`, {
    hint: "Leave out --since, or name a point that holds these disks. Nothing was changed",
  });
}

function compareRest(
  source: MachineSource,
  choices: ReadonlyMap<SourceDisk, BaseChoice>,
  { points, compare, since }: PlanContext,
): Map<SourceDisk, DiskDecision> {
  return chooseComparisons(source.disks, choices, {
    points: since === undefined ? points : [since],
    ...{ clusterSize: DEFAULT_CLUSTER_SIZE, machineUuid: source.identity.uuid },
    names: nameDisks(source.disks, choices),
    always: compare,
  });
}

/** Closes the parents' images. */
export async function closePlans(plans: readonly DiskPlan[]): Promise<void> {
  for (const { base } of plans) {
    await base?.chain.close();
    await base?.hashes?.close();
  }
}

async function planDisk(
  disk: SourceDisk,
  name: string,
  choice: DiskDecision,
  context: PlanContext,
): Promise<DiskPlan> {
  const continues = choice.kind === "full" ? undefined : choice.checkpoint;
  const common = { disk, name, clusterSize: DEFAULT_CLUSTER_SIZE, continues };
  const full = (reason: string, token: string = newDiskToken()): DiskPlan => ({
    ...{ ...common, token, reason },
    ...{ base: undefined, hashKey: newHashKey() },
  });
  if (choice.kind === "full") return full(choice.reason, choice.token);
  if (context.full) return full("asked for", choice.token);
  const plan = { ...common, token: choice.token };
  const { checkpoint, parentDiskName, parentVirtualSize } = choice;
  const { repository, machine, signal } = context;
  if (choice.kind === "compare") {
    const parent = await repository.openComparison(machine, checkpoint, parentDiskName, { signal });
    if (typeof parent === "string") {
      context.warn(`Disk "${name}" is stored in full, since it cannot be compared: ${parent}`);
      return full(`${choice.reason}; cannot compare: ${parent}`, choice.tokenIfFull);
    }
    const base = { bitmap: undefined, overlays: 0, checkpoint, parentVirtualSize, ...parent };
    return { ...plan, base, hashKey: parent.hashes.key, reason: `compared: ${choice.reason}` };
  }
  let chain: PointChain | undefined;
  try {
    chain = await repository.openChain(machine, checkpoint, parentDiskName, { signal });
    const { base: bitmap, overlays } = choice;
    const base = { bitmap, overlays, checkpoint, parentVirtualSize, chain, hashes: undefined };
    return { ...plan, base, hashKey: await repository.hashKey(chain, { signal }), reason: null };
  } catch (error) {
    await chain?.close();
    // An increment of damaged images could not be restored; a full can.
    if (error instanceof DamageError) {
      context.warn(`Disk "${name}" is stored in full, since its parent is damaged: ${error.message}`);
      return full(`parent damaged: ${error.message}`, choice.token);
    }
    throw error;
  }
}
