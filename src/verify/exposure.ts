import type { IoOptions } from "../bytes/index.js";
import { DamageError, NotFoundError } from "../errors/index.js";
import { ClusterDecoder, type CompressedMapping, type Segment } from "../qcow2/index.js";
import { sortPoints, type PointImage, type PointManifest, type Repository } from "../repository/index.js";
import { ObjectReplacedError } from "../storage/index.js";
import type { Subject } from "./check-current.js";

/**
 * What damaged segments of frames cost, in one walk of the image's tables.
 *
 * @returns for each segment the offsets, in the disk, of the clusters whose frames do not decode any more; where all still
 *   do, of all clusters in it: nobody can tell whether garbage is damaged, or one sound frame lies in another's place
 */
export async function damagedClusters(
  { reader }: PointImage,
  segments: readonly Segment[],
  options: IoOptions = {},
): Promise<number[][]> {
  const found = segments.map((segment) => ({ segment, failed: [] as number[], all: [] as number[] }));
  if (found.length === 0) return [];
  const decoder = new ClusterDecoder(reader.format);
  const cluster = Buffer.alloc(reader.clusterSize);
  const decodes = async ({ at, storedLength }: CompressedMapping): Promise<boolean> => {
    const stored = await reader.source.read(at, storedLength, options);
    try {
      decoder.decode(stored, cluster, { object: reader.name, at });
      return true;
    } catch (error) {
      if (!(error instanceof DamageError)) throw error;
      return false;
    }
  };
  for await (const run of reader.map(0, reader.virtualSize, options)) {
    if (run.kind !== "compressed") continue;
    // A frame lies in one segment, whole.
    const holder = found.find(
      ({ segment: { offset, length } }) => run.at >= offset && run.at < offset + length,
    );
    if (holder === undefined) continue;
    holder.all.push(run.offset);
    if (!(await decodes(run))) holder.failed.push(run.offset);
  }
  return found.map(({ failed, all }) => (failed.length > 0 ? failed : all));
}

/**
 * The points that read any of some clusters of an image: those that need the image, but for whom images further up have replaced all of them.
 * Where that cannot be told they count.
 *
 * @param clusters offsets in the disk
 * @returns ids, oldest first
 */
export async function pointsThatRead(
  repository: Repository,
  points: readonly PointManifest[],
  { point, disk }: Subject,
  clusters: readonly number[],
  options: IoOptions = {},
): Promise<string[]> {
  const exposed = new Map([[point.id, clusters]]);
  // A child is younger than its parent: from old to new, what shines through to the parent is known already.
  for (const above of sortPoints(points)) {
    const found = above.disks.find(({ token }) => token === disk.token);
    const below = found?.parent == null ? undefined : exposed.get(found.parent);
    if (found === undefined || below === undefined || below.length === 0) continue;
    exposed.set(above.id, await shiningThrough(repository, { point: above, disk: found }, below, options));
  }
  return [...exposed].filter(([, left]) => left.length > 0).map(([id]) => id);
}

/** Those of some clusters that an image leaves to the one below. */
async function shiningThrough(
  repository: Repository,
  { point, disk }: Subject,
  clusters: readonly number[],
  options: IoOptions,
): Promise<readonly number[]> {
  try {
    const image = await repository.openImage(point.machine.name, point.id, disk.name, options);
    try {
      const { reader } = image;
      const left: number[] = [];
      for (const cluster of clusters) {
        if (cluster >= reader.virtualSize) continue;
        const run = await reader.runAt(
          cluster,
          Math.min(cluster + reader.clusterSize, reader.virtualSize),
          options,
        );
        if (run.kind === "unallocated") left.push(cluster);
      }
      return left;
    } finally {
      await image.close();
    }
  } catch (error) {
    // What is damaged itself, or has just been removed or replaced, does not tell.
    const isSilent =
      error instanceof DamageError || error instanceof NotFoundError || error instanceof ObjectReplacedError;
    if (isSilent) return clusters;
    throw error;
  }
}
