import type { FreezeBase, SourceDisk } from "../source.js";
import { isOfMachine, type BaseContext, type CataloguePoint } from "./catalogue.js";
import { overlaysOn } from "./overlays.js";
import { faultOf, granularityOf, type OwnBitmap } from "./own-bitmap.js";

/** What an increment of a disk starts from. */
export interface IncrementalChoice {
  readonly kind: "incremental";
  /** The bitmap, on the disk's own node or on one of its backing images. */
  readonly base: FreezeBase;
  /** How many images lie on top of that node: snapshots that somebody took since. */
  readonly overlays: number;
  readonly checkpoint: string;
  readonly token: string;
  readonly parentDiskName: string;
  readonly parentVirtualSize: number;
}

/** Judges one candidate. @returns the choice, or why it cannot be the base */
export function judge(
  disk: SourceDisk,
  { bitmap, checkpoint, token }: OwnBitmap,
  point: CataloguePoint | undefined,
  { clusterSize, machineUuid, machineWasAway = false }: BaseContext,
): IncrementalChoice | string {
  if (point === undefined) return `point ${checkpoint} is not in the repository`;
  if (!isOfMachine(point, machineUuid)) return `point ${checkpoint} belongs to another machine`;
  const parent = point.disks.find((item) => item.token === token);
  if (parent === undefined) return `point ${checkpoint} holds no disk with token ${token}`;
  const fault = faultOf(bitmap);
  if (fault !== undefined) return fault;
  const holder = findHolder(disk, bitmap.node);
  if (typeof holder === "string") return holder;
  if (machineWasAway && (!bitmap.persistent || holder.overlays > 0)) {
    const what = bitmap.persistent ? "snapshots were taken" : `${disk.format} disk`;
    return `machine was migrated away and came back (${what}: its bitmap knows nothing of that time)`;
  }
  const granularity = granularityOf(holder, clusterSize);
  if (bitmap.granularity !== granularity) {
    return `bitmap granularity is ${bitmap.granularity}, ${granularity} is needed`;
  }
  if (parent.clusterSize !== clusterSize) {
    return `point ${checkpoint} uses clusters of ${parent.clusterSize}, not of ${clusterSize}`;
  }
  return {
    kind: "incremental",
    base: { node: bitmap.node, name: bitmap.name },
    overlays: holder.overlays,
    checkpoint,
    token,
    parentDiskName: parent.name,
    parentVirtualSize: parent.virtualSize,
  };
}

/**
 * Finds the image that holds a bitmap, and how many lie on top of it.
 *
 * A bitmap on a backing image is as good as one on the disk's own image: at its checkpoint the disk was that image,
 * and it recorded all that changed in it since, commits of overlays into it included. What no overlay holds shines
 * through from it; what one holds may have changed, whenever that overlay was made. So what the bitmap shows, and what
 * the overlays hold, is all that can have changed.
 *
 * @returns why the overlays cannot be counted in, if so
 */
function findHolder(
  disk: SourceDisk,
  node: string,
): { readonly overlays: number; readonly imageClusterSize: number } | string {
  const overlays = overlaysOn(disk, node);
  if (overlays === 0) return { overlays, imageClusterSize: disk.imageClusterSize };
  const between = disk.backing.slice(0, (overlays ?? 0) - 1);
  const holder = overlays === undefined ? undefined : disk.backing[overlays - 1];
  if (holder === undefined || overlays === undefined) return "bitmap is on no image of the disk";
  // QEMU counts a filter as an image of its own, and merges only bitmaps of one size.
  if (between.some(({ isFilter }) => isFilter))
    return "bitmap is on a backing image, with a filter on top of it";
  if (holder.virtualSize !== disk.virtualSize)
    return "bitmap is on a backing image: an external snapshot was taken since, and the disk resized";
  return { overlays, imageClusterSize: holder.imageClusterSize };
}
