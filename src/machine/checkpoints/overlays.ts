import type { FreezeDisk, SourceDisk } from "../source.js";

/**
 * How many images lie on top of a node of a disk: 0 for the disk's own, undefined for none of the disk's.
 * A chain that becomes shorter while it is read only makes depths smaller than this.
 */
export function overlaysOn(
  { node, backing }: Pick<SourceDisk, "node" | "backing">,
  holder: string,
): number | undefined {
  if (holder === node) return 0;
  const index = backing.findIndex((image) => image.node === holder);
  return index < 0 ? undefined : index + 1;
}

/** Whether a disk's changes are those of a base below overlays, and of what these hold. */
export function isBelowOverlays({ disk, base }: Pick<FreezeDisk, "disk" | "base">): boolean {
  return base !== undefined && base.node !== disk.node;
}
