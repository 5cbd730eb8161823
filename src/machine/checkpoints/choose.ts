import type { SourceDisk } from "../source.js";
import { isOfMachine, lookUp, type BaseContext, type CataloguePoint } from "./catalogue.js";
import { judge, type IncrementalChoice } from "./judge.js";
import { ownBitmaps, type OwnBitmap } from "./own-bitmap.js";

export type BaseChoice =
  | IncrementalChoice
  | {
      readonly kind: "full";
      /** Why, one clause for people: "first backup of this disk". */
      readonly reason: string;
      /** The disk's token, where it is known and still its own. */
      readonly token?: string | undefined;
    };

/**
 * Chooses what a disk's next backup starts from: the newest bitmap of ours and of this repository that is
 * healthy and whose point the catalogue holds with the token the bitmap names. Without one the disk goes
 * full, alone, with the reason that concerns the newest candidate of this machine. With `context.since` only that
 * checkpoint's bitmap counts.
 */
export async function chooseBase(disk: SourceDisk, context: BaseContext): Promise<BaseChoice> {
  const points = (context.points ?? []).filter((point) => isOfMachine(point, context.machineUuid));
  const tokens = new Set(points.flatMap(({ disks }) => disks.map((known) => known.token)));
  let reason: string | undefined;
  let strange: string | undefined;
  let token: string | undefined;
  for (const candidate of ownBitmaps(disk, context.repositoryTag)) {
    const point = await lookUp(context.catalogue, candidate.checkpoint);
    if (context.since !== undefined && candidate.checkpoint !== context.since) {
      // It does not serve, but it knows the disk.
      if (holds(point, candidate, context)) token ??= candidate.token;
      continue;
    }
    if (point === "unreadable") {
      reason ??= `the manifest of point ${candidate.checkpoint} is damaged`;
      continue;
    }
    const verdict = judge(disk, candidate, point, context);
    if (typeof verdict !== "string") return verdict;
    const isOurs = point !== undefined && isOfMachine(point, context.machineUuid);
    // What another machine of the repository left on the disk explains nothing while there is something of ours.
    if (isOurs || tokens.has(candidate.token)) reason ??= verdict;
    else strange ??= verdict;
    if (isOurs) token ??= candidate.token;
  }
  if (context.since !== undefined)
    return {
      kind: "full",
      reason: reason ?? strange ?? `checkpoint ${context.since} is not kept on this disk`,
      token,
    };
  const wasBackedUp = tokenOf(disk.name, points) !== undefined;
  if (!wasBackedUp) reason ??= strange;
  return { kind: "full", reason: reason ?? explainAbsence(disk, wasBackedUp), token };
}

function holds(
  point: CataloguePoint | "unreadable" | undefined,
  { token }: OwnBitmap,
  { machineUuid }: BaseContext,
): boolean {
  if (point === undefined || point === "unreadable" || !isOfMachine(point, machineUuid)) return false;
  return point.disks.some((disk) => disk.token === token);
}

/** The token of the disk that had this name last. */
function tokenOf(name: string, points: readonly CataloguePoint[] = []): string | undefined {
  const holders = points.flatMap(({ disks }) => disks.filter((disk) => disk.name === name));
  return holders.at(-1)?.token;
}

/**
 * `chooseBase` for all disks of a run. Two disks can carry the same checkpoint when one image was copied from
 * the other, or both have it as their backing image; only one of them can go on with the chain: the one that has the
 * parent's name, else the first.
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

function explainAbsence(disk: SourceDisk, wasBackedUp: boolean): string {
  if (!wasBackedUp) return "first backup of this disk";
  return disk.canPersist
    ? "checkpoint bitmap missing (disk replaced, or QEMU was killed before it was stored)"
    : `checkpoint bitmap missing (${disk.format} disk, QEMU restarted)`;
}
