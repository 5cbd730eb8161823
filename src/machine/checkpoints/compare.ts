import type { SourceDisk } from "../source.js";
import { isOfMachine, type CataloguePoint } from "./catalogue.js";
import type { BaseChoice } from "./choose.js";

/** No bitmap tells what changed: the disk is read in full, and what differs from a point is stored. */
export interface ComparisonChoice {
  readonly kind: "compare";
  /** Id of the point. */
  readonly checkpoint: string;
  readonly token: string;
  readonly parentDiskName: string;
  readonly parentVirtualSize: number;
  /** Why no bitmap is used, one clause for people. */
  readonly reason: string;
  /** The disk's token where it cannot be compared after all and goes full. */
  readonly tokenIfFull: string | undefined;
}

export type DiskDecision = BaseChoice | ComparisonChoice;

/** What the choice of a point to compare with depends on. */
export interface ComparisonContext {
  /** The machine's points, oldest first. */
  readonly points: readonly CataloguePoint[];
  readonly machineUuid: string | null;
  /** Bytes per cluster of the images to be written. */
  readonly clusterSize: number;
  /** Names of the disks in the next point, as far as they are known. */
  readonly names: ReadonlyMap<SourceDisk, string>;
  /** Compare disks that have a bitmap, too: the user wants it. */
  readonly always?: boolean | undefined;
}

/**
 * Finds for each disk that would go full the point to compare it with: the newest of this machine that holds the
 * disk, by its token where that is known, else by its name. Whatever such a point holds, comparing is right: all that
 * differs is stored. But a chain goes on with one disk only, so a token that another disk has is not taken.
 *
 * @returns the choices, with comparisons in the place of those that have a point
 */
export function chooseComparisons(
  disks: readonly SourceDisk[],
  choices: ReadonlyMap<SourceDisk, BaseChoice>,
  context: ComparisonContext,
): Map<SourceDisk, DiskDecision> {
  const { names, machineUuid, clusterSize, always = false } = context;
  const candidates = context.points
    .filter((point) => isOfMachine(point, machineUuid))
    .flatMap(({ id, disks: held }) => held.map((disk) => ({ ...disk, id })))
    .filter((disk) => disk.clusterSize === clusterSize)
    .reverse();
  const taken = new Set([...choices.values()].flatMap(({ token }) => token ?? []));
  const decisions = new Map<SourceDisk, DiskDecision>(choices);
  for (const disk of disks) {
    const choice = choices.get(disk);
    if (choice === undefined || (choice.kind === "incremental" && !always)) continue;
    const { token } = choice;
    const name = names.get(disk) ?? disk.name;
    const found = candidates.find((held) =>
      token === undefined ? held.name === name : held.token === token,
    );
    if (found === undefined || (token === undefined && taken.has(found.token))) continue;
    taken.add(found.token);
    decisions.set(disk, {
      kind: "compare",
      checkpoint: found.id,
      token: found.token,
      parentDiskName: found.name,
      parentVirtualSize: found.virtualSize,
      reason: choice.kind === "full" ? choice.reason : "--compare was given",
      tokenIfFull: token,
    });
  }
  return decisions;
}
