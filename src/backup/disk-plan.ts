import type { IoOptions } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
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
}

/**
 * Decides for each disk: an increment of the newest checkpoint that can be trusted; else what differs from the newest
 * point that holds it; else full, and why.
 */
export async function planDisks(source: MachineSource, context: PlanContext): Promise<DiskPlan[]> {
  const choices = await chooseAll(source, context);
  const decisions = context.full ? choices : compareRest(source, choices, context);
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
    return plans;
  } catch (error) {
    await closePlans(plans);
    throw error;
  }
}

async function chooseAll(
  source: MachineSource,
  { repository, machine, points, signal }: PlanContext,
): Promise<Map<SourceDisk, BaseChoice>> {
  const checkpoints = checkpointsOf(repository, machine, { signal });
  const facts = { points, clusterSize: DEFAULT_CLUSTER_SIZE };
  return await chooseBases(source.disks, baseContextOf(checkpoints, source.identity, facts));
}

function compareRest(
  source: MachineSource,
  choices: ReadonlyMap<SourceDisk, BaseChoice>,
  { points, compare }: PlanContext,
): Map<SourceDisk, DiskDecision> {
  return chooseComparisons(source.disks, choices, {
    ...{ points, clusterSize: DEFAULT_CLUSTER_SIZE, machineUuid: source.identity.uuid },
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
  const common = { disk, name, clusterSize: DEFAULT_CLUSTER_SIZE };
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
