import type { IoOptions } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
import {
  baseContextOf,
  checkpointsOf,
  chooseBases,
  chooseComparisons,
  nameDisks,
  openLiveMachine,
  recover,
  type DiskDecision,
  type LiveMachine,
  type MachineIdentity,
  type RecoverOptions,
  type SourceBitmap,
  type SourceDisk,
} from "../machine/index.js";
import { parseBitmapName } from "../point/index.js";
import { DEFAULT_CLUSTER_SIZE } from "../qcow2/index.js";
import type { QmpAddress } from "../qmp/index.js";
import type { Repository } from "../repository/index.js";
import { leftoverLines, type LeftoverLine } from "./leftovers.js";

/** A checkpoint that a disk carries. */
export interface CheckpointStatus {
  readonly id: string;
  /** First 8 hex digits of the repository that it belongs to. */
  readonly repository: string;
  /** Name of the third party whose checkpoint it is; null for tidemark's own. */
  readonly consumer: string | null;
  readonly dirtyBytes: number;
  readonly state: "recording" | "inconsistent" | "not recording" | "in use" | "read-only";
}

/** A disk as QEMU has it, and what its next backup will be. */
export interface DiskStatus {
  readonly name: string;
  readonly qdev: string | null;
  readonly node: string;
  readonly virtualSize: number;
  readonly checkpoints: readonly CheckpointStatus[];
  /** null when no repository was named. */
  readonly next: NextBackup | null;
}

/** What the next backup of a disk will be. */
export interface NextBackup {
  readonly kind: "full" | "incremental";
  /** Why it is not by a bitmap. */
  readonly reason: string | null;
  /** Id of the point that it continues: on a branch not the newest one; null for a full. */
  readonly parent: string | null;
}

/** What QEMU carries. */
export interface MachineStatus {
  readonly machine: Pick<MachineIdentity, "name" | "uuid" | "state"> & { readonly qemu: string };
  readonly disks: readonly DiskStatus[];
  /** Disks that cannot be backed up. */
  readonly refused: readonly { readonly name: string; readonly reason: string }[];
  readonly leftovers: readonly LeftoverLine[];
}

/** What to look at. */
export interface InspectOptions extends IoOptions {
  readonly address: QmpAddress;
  readonly runDirectory: string;
  /** The machine in its repository: without it nobody can tell what the next backup will do. */
  readonly catalogue?: { readonly repository: Repository; readonly machine: string } | undefined;
}

/** Looks at a machine: what QEMU carries, what dead runs left, what the next backup would do. Changes nothing. */
export async function inspectMachine(options: InspectOptions): Promise<MachineStatus> {
  const { address, runDirectory, signal } = options;
  await using machine = await openLiveMachine({ address, runDirectory, lookOnly: true, signal });
  const choices = await choose(machine, options);
  const names = nameDisks(machine.disks, choices ?? new Map());
  const { name, uuid, state, qemuVersion } = machine.identity;
  return {
    machine: { name, uuid, state, qemu: qemuVersion },
    disks: await Promise.all(
      machine.disks.map(async (disk) =>
        describeDisk(disk, names.get(disk) ?? disk.name, await foretell(choices?.get(disk), options)),
      ),
    ),
    refused: machine.refused.map((disk) => ({
      name: disk.deviceId ?? disk.driveId ?? disk.qdev ?? "(unnamed)",
      reason: disk.reason,
    })),
    leftovers: leftoverLines(await recover(machine, { ...judgement(options), dryRun: true, signal })),
  };
}

/** What lets the repository decide about bitmaps, as `cleanup` would. */
function judgement({ catalogue, signal }: InspectOptions): Pick<RecoverOptions, "checkpoints"> {
  if (catalogue === undefined) return {};
  const { repository, machine } = catalogue;
  return { checkpoints: checkpointsOf(repository, machine, { signal }) };
}

async function choose(
  machine: LiveMachine,
  { catalogue, signal }: InspectOptions,
): Promise<Map<SourceDisk, DiskDecision> | undefined> {
  if (catalogue === undefined) return undefined;
  const { repository, machine: name } = catalogue;
  const { points } = await repository.survey(name, { signal });
  const checkpoints = checkpointsOf(repository, name, { signal });
  const facts = { points, clusterSize: DEFAULT_CLUSTER_SIZE };
  const context = baseContextOf(checkpoints, machine.identity, facts);
  const choices = await chooseBases(machine.disks, context);
  const names = nameDisks(machine.disks, choices);
  return chooseComparisons(machine.disks, choices, { ...context, points, names });
}

/** What the next backup of a disk will be. */
async function foretell(
  choice: DiskDecision | undefined,
  { catalogue, signal }: InspectOptions,
): Promise<NextBackup | null> {
  if (choice === undefined || catalogue === undefined) return null;
  const full = (reason: string): NextBackup => ({ kind: "full", reason, parent: null });
  if (choice.kind === "full") return full(choice.reason);
  const { repository, machine } = catalogue;
  const { checkpoint, parentDiskName } = choice;
  if (choice.kind === "compare") {
    const parent = await repository.openComparison(machine, checkpoint, parentDiskName, { signal });
    if (typeof parent === "string") return full(`${choice.reason}; cannot compare: ${parent}`);
    await Promise.all([parent.chain.close(), parent.hashes.close()]);
    return { kind: "incremental", reason: `will be compared: ${choice.reason}`, parent: checkpoint };
  }
  try {
    const chain = await repository.openChain(machine, checkpoint, parentDiskName, { signal });
    await chain.close();
    return { kind: "incremental", reason: null, parent: checkpoint };
  } catch (error) {
    if (error instanceof DamageError) return full(`parent damaged: ${error.message}`);
    throw error;
  }
}

function describeDisk(disk: SourceDisk, name: string, next: DiskStatus["next"]): DiskStatus {
  return {
    name,
    qdev: disk.qdev,
    node: disk.node,
    virtualSize: disk.virtualSize,
    checkpoints: disk.bitmaps.flatMap((bitmap) => {
      const identity = parseBitmapName(bitmap.name);
      if (identity === undefined) return [];
      const { checkpoint: id, repository } = identity;
      return [{ id, repository, consumer: null, dirtyBytes: bitmap.dirtyBytes, state: stateOf(bitmap) }];
    }),
    next,
  };
}

function stateOf(bitmap: SourceBitmap): CheckpointStatus["state"] {
  if (bitmap.inconsistent) return "inconsistent";
  if (bitmap.readOnly) return "read-only";
  if (bitmap.busy) return "in use";
  return bitmap.recording ? "recording" : "not recording";
}
