import type { IoOptions } from "../bytes/index.js";
import { DamageError, messageOf } from "../errors/index.js";
import { measureReads } from "../qcow2/index.js";
import {
  NewerFormatError,
  type DiskManifest,
  type PointManifest,
  type Repository,
} from "../repository/index.js";

/** What restoring a disk reads of one image. */
export interface ImageCost {
  /** Id of the image's point. */
  readonly point: string;
  /** Bytes of data that are read, as it is stored. */
  readonly bytes: number;
  /** Bytes of the image. */
  readonly stored: number;
}

/** What restoring a disk reads. */
export interface DiskCost {
  /** The disk's name. */
  readonly name: string;
  /** Bytes of data that are read of all images together; null when it cannot be restored. */
  readonly bytes: number | null;
  /** Top first, the full one last; none when it cannot be restored. */
  readonly images: readonly ImageCost[];
  /** Why it cannot be restored, as far as headers and tables tell, for people; null when nothing is wrong. */
  readonly problem: string | null;
}

/** What restoring a point reads. */
export interface RestoreCost {
  /** Bytes of data of all disks that can be restored. */
  readonly bytes: number;
  readonly disks: readonly DiskCost[];
}

/**
 * What restoring a point would read, told from the images' tables alone: of a long chain much is overwritten by later
 * points, and only read when they are.
 */
export async function restoreCost(
  repository: Repository,
  point: PointManifest,
  options: IoOptions = {},
): Promise<RestoreCost> {
  const disks: DiskCost[] = [];
  // One after the other: the tables that are kept in memory are those of one chain.
  for (const disk of point.disks) disks.push(await diskCost(repository, point, disk, options));
  return { bytes: disks.reduce((sum, { bytes }) => sum + (bytes ?? 0), 0), disks };
}

async function diskCost(
  repository: Repository,
  point: PointManifest,
  { name }: DiskManifest,
  options: IoOptions,
): Promise<DiskCost> {
  try {
    const opened = await repository.openChain(point.machine.name, point.id, name, options);
    try {
      const reads = await measureReads(opened.chain, options);
      const images = opened.images.map((image, index) => ({
        point: image.point.id,
        bytes: reads[index] ?? 0,
        stored: image.disk.bytes,
      }));
      return { name, bytes: images.reduce((sum, { bytes }) => sum + bytes, 0), images, problem: null };
    } catch (error) {
      throw await opened.explain(error);
    } finally {
      await opened.close();
    }
  } catch (error) {
    const isTold = error instanceof DamageError || error instanceof NewerFormatError;
    if (!isTold) throw error;
    return { name, bytes: null, images: [], problem: messageOf(error) };
  }
}
