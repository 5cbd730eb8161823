import { UsageError } from "../../errors/index.js";
import { isName, requireName } from "../../point/index.js";

/** A disk of the user's choice: a device id, drive id, node name or QOM path, and the name it shall have. */
export interface DiskChoice {
  readonly device: string;
  readonly name?: string | undefined;
}

/** What a disk or device can be called by. */
export interface Selectable {
  readonly deviceId: string | null;
  readonly driveId: string | null;
  readonly qdev: string | null;
  /** Node names: the format node's and that of the node the device uses. */
  readonly nodes: readonly string[];
}

/** What QEMU's object model calls the part of a virtio device that a disk is attached to. */
const BACKEND = "/virtio-backend";

/** Whether `device` means this disk. */
export function isCalled(disk: Selectable, device: string): boolean {
  return [disk.deviceId, disk.driveId, disk.qdev, ...pathsOf(disk), ...disk.nodes].includes(device);
}

/** QOM paths of a disk's device: `qdev` is one, or an id, or names the device's backend. */
function pathsOf({ qdev }: Selectable): string[] {
  if (qdev === null) return [];
  const path = qdev.startsWith("/") ? qdev : `/machine/peripheral/${qdev}`;
  return path.endsWith(BACKEND) ? [path, path.slice(0, -BACKEND.length)] : [path];
}

/** How a list of disks shows one: everything it can be called by, best first. */
export function describeNames(disk: Selectable): string {
  const names = [disk.deviceId, disk.driveId, ...disk.nodes, disk.qdev].filter((name) => name !== null);
  return [...new Set(names)].slice(0, 2).join(" = ");
}

/** What QEMU calls a -drive without an id, by its position on its bus: virtio0, ide0-hd1. */
const POSITION = /^(?:none|ide|scsi|virtio|xen|sd|mtd)\d+(?:-hd\d+)?$/;

/**
 * Device id, else drive id, else `disk<N>`: the first that is a name and that no earlier disk has. A disk is
 * `anonymous` when that name says no more than a position.
 *
 * @returns one name for each disk, in order
 */
export function suggestNames(
  disks: readonly Pick<Selectable, "deviceId" | "driveId">[],
): { readonly name: string; readonly anonymous: boolean }[] {
  const taken = new Set<string>();
  return disks.map(({ deviceId, driveId }, index) => {
    const given = [deviceId, driveId]
      .filter((name) => name !== null)
      .find((name) => isName(name) && !taken.has(name));
    let number = index;
    while (given === undefined && taken.has(`disk${number}`)) number += 1;
    const name = given ?? `disk${number}`;
    taken.add(name);
    return { name, anonymous: given === undefined || (given !== deviceId && POSITION.test(given)) };
  });
}

/**
 * The disks that were chosen, each with its name, in the order of `disks`. Without a choice all of them.
 *
 * @throws {UsageError} when a choice fits no disk, two choices fit one, or two disks would have one name
 */
export function chooseDisks<D extends Selectable>(
  disks: readonly (D & { readonly suggestedName: string })[],
  choices: readonly DiskChoice[] | undefined,
  others: readonly Selectable[] = [],
): (D & { readonly suggestedName: string; readonly name: string })[] {
  if (choices === undefined) return disks.map((disk) => ({ ...disk, name: disk.suggestedName }));
  for (const { device, name } of choices) {
    if (name !== undefined) requireName("disk", name);
    if (disks.some((disk) => isCalled(disk, device)) || others.some((disk) => isCalled(disk, device)))
      continue;
    throw new UsageError(`The machine has no disk "${device}"`, {
      hint: `Its disks: ${disks.map(describeNames).join(", ") || "none"}`,
    });
  }
  const chosen = disks.flatMap((disk) => {
    const fitting = choices.filter(({ device }) => isCalled(disk, device));
    const [choice] = fitting;
    if (choice === undefined) return [];
    if (fitting.length === 1) return [{ ...disk, name: choice.name ?? disk.suggestedName }];
    throw new UsageError(`${fitting.map(({ device }) => `"${device}"`).join(" and ")} are the same disk`);
  });
  const twice = chosen.find((disk, index) => chosen.findIndex(({ name }) => name === disk.name) !== index);
  if (twice === undefined) return chosen;
  throw new UsageError(`Two disks would have the name "${twice.name}"`, {
    hint: "Give them names of their own: --disk DEVICE=NAME",
  });
}
