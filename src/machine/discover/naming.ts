import type { DiskDecision } from "../checkpoints/compare.js";
import type { SourceDisk } from "../source.js";

/**
 * The name of each disk in its next point. A name that the user gave, or a device id, stands. A disk that is
 * known only by its position keeps the name that its chain has, since positions change when drives are added;
 * a new one gets the first `disk<N>` that is free.
 */
export function nameDisks(
  disks: readonly SourceDisk[],
  choices: ReadonlyMap<SourceDisk, DiskDecision>,
): Map<SourceDisk, string> {
  const names = new Map<SourceDisk, string>();
  const isFixed = (disk: SourceDisk): boolean => !disk.anonymous || disk.name !== disk.suggestedName;
  for (const disk of disks) if (isFixed(disk)) names.set(disk, disk.name);
  const taken = new Set(names.values());
  const give = (disk: SourceDisk, name: string): void => {
    names.set(disk, name);
    taken.add(name);
  };
  for (const disk of disks) {
    const choice = choices.get(disk);
    if (names.has(disk) || choice === undefined || choice.kind === "full") continue;
    if (!taken.has(choice.parentDiskName)) give(disk, choice.parentDiskName);
  }
  for (const disk of disks) {
    if (names.has(disk)) continue;
    let name = disk.name;
    for (let number = 0; taken.has(name); number += 1) name = `disk${number}`;
    give(disk, name);
  }
  return names;
}
