import { DamageError } from "../errors/index.js";
import { parseBitmapName, type BitmapIdentity } from "../point/index.js";
import type { SourceBitmap, SourceDisk } from "./source.js";

/** A point of the repository, as far as checkpoints are judged by it. */
export interface CataloguePoint {
  readonly id: string;
  /** `uuid`: null when the machine had none. */
  readonly machine: { readonly uuid: string | null };
  readonly disks: readonly {
    readonly name: string;
    readonly token: string;
    readonly virtualSize: number;
    readonly clusterSize: number;
  }[];
}

/**
 * Looks a checkpoint's point up in the repository. `undefined` says that it is definitely not there; whoever
 * cannot tell throws, because bitmaps are removed on this word.
 */
export type Catalogue = (checkpoint: string) => Promise<CataloguePoint | undefined>;

/** What the choice of a base depends on. */
export interface BaseContext {
  readonly repositoryTag: string;
  /** Bytes per cluster of the images to be written. */
  readonly clusterSize: number;
  readonly catalogue: Catalogue;
  readonly machineUuid: string | null;
  /** See `MachineIdentity.wasAway`. */
  readonly machineWasAway?: boolean | undefined;
  /** The machine's points, oldest first: they tell a disk that lost its checkpoint from a new one. */
  readonly points?: readonly CataloguePoint[] | undefined;
}

export type BaseChoice =
  | {
      readonly kind: "incremental";
      /** Name of the bitmap. */
      readonly base: string;
      readonly checkpoint: string;
      readonly token: string;
      readonly parentDiskName: string;
      readonly parentVirtualSize: number;
    }
  | {
      readonly kind: "full";
      /** Why, one clause for people: "first backup of this disk". */
      readonly reason: string;
      /** The disk's token, where it is known and still its own. */
      readonly token?: string | undefined;
    };

/** A bitmap of ours and of one repository, on a disk. */
interface OwnBitmap extends BitmapIdentity {
  readonly bitmap: SourceBitmap;
}

/** Our bitmaps of one repository that a disk carries, newest checkpoint first. */
export function ownBitmaps(disk: Pick<SourceDisk, "bitmaps">, repositoryTag: string): OwnBitmap[] {
  return disk.bitmaps
    .flatMap((bitmap) => {
      const identity = parseBitmapName(bitmap.name);
      return identity?.repository === repositoryTag ? [{ ...identity, bitmap }] : [];
    })
    .sort((a, b) => (a.checkpoint < b.checkpoint ? 1 : -1));
}

/**
 * Chooses what a disk's next backup starts from: the newest bitmap of ours and of this repository that is
 * healthy and whose point the catalogue holds with the token the bitmap names. Without one the disk goes
 * full, alone, with the reason that concerns the newest candidate.
 */
export async function chooseBase(disk: SourceDisk, context: BaseContext): Promise<BaseChoice> {
  let reason: string | undefined;
  let token: string | undefined;
  for (const candidate of ownBitmaps(disk, context.repositoryTag)) {
    const point = await context.catalogue(candidate.checkpoint);
    const verdict = judge(disk, candidate, point, context);
    if (typeof verdict !== "string") return verdict;
    reason ??= verdict;
    if (point !== undefined && isOfMachine(point, context.machineUuid)) token ??= candidate.token;
  }
  const known = tokenOf(disk.name, context.points);
  return { kind: "full", reason: reason ?? explainAbsence(disk, known !== undefined), token };
}

/** The token of the disk that had this name last. */
function tokenOf(name: string, points: readonly CataloguePoint[] = []): string | undefined {
  const holders = points.flatMap(({ disks }) => disks.filter((disk) => disk.name === name));
  return holders.at(-1)?.token;
}

/**
 * `chooseBase` for all disks of a run. Two disks can carry the same checkpoint when one image was copied from
 * the other; only one of them can go on with the chain: the one that has the parent's name, else the first.
 */
export async function chooseBases(
  disks: readonly SourceDisk[],
  context: BaseContext,
): Promise<Map<SourceDisk, BaseChoice>> {
  const choices = new Map<SourceDisk, BaseChoice>();
  for (const disk of disks) choices.set(disk, await chooseBase(disk, context));
  const tokens = new Set([...choices.values()].map(({ token }) => token));
  for (const disk of disks) {
    // Whoever had its name is here under another one: it did not lose that one's checkpoint.
    const isNew = ownBitmaps(disk, context.repositoryTag).length === 0;
    const predecessor = tokenOf(disk.name, context.points);
    if (isNew && predecessor !== undefined && tokens.has(predecessor))
      choices.set(disk, { kind: "full", reason: explainAbsence(disk, false) });
  }
  const owners = new Map<string, SourceDisk>();
  for (const [disk, choice] of choices) {
    if (choice.token === undefined) continue;
    const isNamesake = choice.kind === "incremental" && choice.parentDiskName === disk.name;
    if (isNamesake || !owners.has(choice.token)) owners.set(choice.token, disk);
  }
  for (const [disk, choice] of choices) {
    const owner = choice.token === undefined ? disk : owners.get(choice.token);
    if (owner === undefined || owner === disk) continue;
    choices.set(disk, {
      kind: "full",
      reason: `carries the same checkpoint as disk ${owner.name}: a copied image`,
    });
  }
  return choices;
}

/**
 * Bytes per bit of a disk's checkpoints: those of the backup's clusters or, where these are larger, of the disk's
 * own. A disk that is cut and grown back loses the bits behind the cut, but qcow2 keeps the bytes of the cluster
 * that was cut; with a bit for the whole of it, what was written there stays marked.
 */
export function granularityOf(disk: Pick<SourceDisk, "imageClusterSize">, clusterSize: number): number {
  return Math.max(disk.imageClusterSize, clusterSize);
}

function judge(
  disk: SourceDisk,
  { bitmap, checkpoint, token }: OwnBitmap,
  point: CataloguePoint | undefined,
  { clusterSize, machineUuid, machineWasAway = false }: BaseContext,
): BaseChoice | string {
  if (point === undefined) return `point ${checkpoint} is not in the repository`;
  if (!isOfMachine(point, machineUuid)) return `point ${checkpoint} belongs to another machine`;
  const parent = point.disks.find((disk) => disk.token === token);
  if (parent === undefined) return `point ${checkpoint} holds no disk with token ${token}`;
  const fault = faultOf(bitmap);
  if (fault !== undefined) return fault;
  if (machineWasAway && !bitmap.persistent) {
    return `machine was migrated away and came back (${disk.format} disk: its bitmap knows nothing of that time)`;
  }
  const granularity = granularityOf(disk, clusterSize);
  if (bitmap.granularity !== granularity) {
    return `bitmap granularity is ${bitmap.granularity}, ${granularity} is needed`;
  }
  if (parent.clusterSize !== clusterSize) {
    return `point ${checkpoint} uses clusters of ${parent.clusterSize}, not of ${clusterSize}`;
  }
  return {
    kind: "incremental",
    base: bitmap.name,
    checkpoint,
    token,
    parentDiskName: parent.name,
    parentVirtualSize: parent.virtualSize,
  };
}

/** Why a bitmap does not hold all writes since its checkpoint; undefined when it does. */
function faultOf(bitmap: SourceBitmap): string | undefined {
  if (bitmap.inconsistent) return "bitmap inconsistent: QEMU did not shut down cleanly";
  if (bitmap.readOnly) return "bitmap is on a backing image: an external snapshot was taken since";
  if (bitmap.busy) return "bitmap is in use by another program";
  if (!bitmap.recording) return "bitmap does not record";
  return undefined;
}

function explainAbsence(disk: SourceDisk, wasBackedUp: boolean): string {
  if (!wasBackedUp) return "first backup of this disk";
  return disk.canPersist
    ? "checkpoint bitmap missing (disk replaced, or QEMU was killed before it was stored)"
    : `checkpoint bitmap missing (${disk.format} disk, QEMU restarted)`;
}

/** Machines without a uuid cannot be told apart by it: their name in the repository has to do. */
function isOfMachine(point: CataloguePoint, uuid: string | null): boolean {
  return point.machine.uuid === null || uuid === null || point.machine.uuid === uuid;
}

/** A bitmap that may go, and why. */
export interface RemovableBitmap {
  readonly disk: string;
  readonly node: string;
  readonly name: string;
  /** `old`: a newer checkpoint took its place; `uncommitted`: its point never came to be. */
  readonly why: "old" | "uncommitted";
}

/**
 * The catalogue rule: which of our bitmaps on a disk may be removed. Nothing is removed before a newer point
 * of this machine and repository, with the same token, is positively in the catalogue and that point's own
 * bitmap on this disk is healthy; what was never committed goes by the same rule. Bitmaps that cannot be
 * removed now (read-only node, in use) are left out.
 *
 * @param context.keepCheckpoints how many checkpoints are kept, the newest included; default 1
 * @throws whatever the catalogue throws: an error is never "absent"
 */
export async function bitmapsToRemove(
  disk: SourceDisk,
  context: Pick<BaseContext, "repositoryTag" | "catalogue" | "machineUuid"> & {
    readonly keepCheckpoints?: number | undefined;
  },
): Promise<RemovableBitmap[]> {
  const { repositoryTag, catalogue, machineUuid, keepCheckpoints = 1 } = context;
  /** Healthy and committed bitmaps newer than the one being judged, by token. */
  const newer = new Map<string, number>();
  const removable: RemovableBitmap[] = [];
  for (const { bitmap, checkpoint, token } of ownBitmaps(disk, repositoryTag)) {
    const point = await lookUp(catalogue, checkpoint);
    // Nobody can tell: it stays.
    if (point === "unreadable") continue;
    const isCommitted =
      point !== undefined &&
      isOfMachine(point, machineUuid) &&
      point.disks.some((item) => item.token === token);
    const successors = newer.get(token) ?? 0;
    // A point that is there, but not ours, says nothing about this bitmap: it stays.
    const why = isCommitted ? "old" : "uncommitted";
    const mayGo = isCommitted ? successors >= keepCheckpoints : point === undefined && successors > 0;
    if (mayGo && !bitmap.readOnly && !bitmap.busy) {
      removable.push({ disk: disk.name, node: bitmap.node, name: bitmap.name, why });
    }
    if (isCommitted && faultOf(bitmap) === undefined) newer.set(token, successors + 1);
  }
  return removable;
}

/** A point whose manifest is damaged is neither there nor absent. Any other error is the caller's. */
async function lookUp(
  catalogue: Catalogue,
  checkpoint: string,
): Promise<CataloguePoint | "unreadable" | undefined> {
  try {
    return await catalogue(checkpoint);
  } catch (error) {
    if (error instanceof DamageError) return "unreadable";
    throw error;
  }
}
