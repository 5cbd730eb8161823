import { roundUp, type IoOptions } from "../bytes/index.js";
import type { ImageChain } from "./chain.js";
import { frameLengths } from "./frame-lengths.js";
import { ENTRY_BYTES, l1EntriesFor, l2EntriesOf } from "./layout.js";
import { MergeWalk } from "./merge-walk.js";
import { refcountClusters } from "./refcounts.js";

/** What a merge makes of its images. */
export interface MergeMeasure {
  /** Bytes of frames that each image gives: exact, but for at most a sector wherever one is followed by none. */
  readonly frameBytes: readonly number[];
  readonly dataClusters: number;
  /** Clusters among them that have to be made anew, at an image's end. Their frames are in no image. */
  readonly cutClusters: number;
  /** L2 tables of the merged image. */
  readonly tables: number;
}

/** Looks, in the tables alone, at what a merge would take from each of its images. @param count images that are merged, from the top */
export async function measureMerge(
  chain: ImageChain,
  count: number,
  options: IoOptions = {},
): Promise<MergeMeasure> {
  const images = chain.images.slice(0, count);
  const frameBytes = images.map(() => 0);
  const walk = new MergeWalk(images, chain.images[count]?.virtualSize, options);
  const clusterSize = images[0]?.clusterSize ?? 1;
  const clusters = Math.ceil(chain.virtualSize / clusterSize);
  const step = l2EntriesOf(clusterSize);
  let [dataClusters, cutClusters, tables] = [0, 0, 0];
  for (let first = 0; first < clusters; first += step) {
    const end = Math.min(first + step, clusters);
    const places = images.map((): number[] => []);
    let isMapped = false;
    for await (const run of walk.runs(first, end)) {
      if (run.kind === "unallocated") continue;
      isMapped = true;
      if (run.kind === "zero") continue;
      dataClusters += 1;
      if (run.kind === "frame") places[run.image]?.push(run.at);
      else cutClusters += 1;
    }
    if (isMapped) tables += 1;
    for (const [image, reader] of images.entries()) {
      if (places[image]?.length === 0) continue;
      const lengths = await frameLengths(reader, first, end, options);
      for (const at of places[image] ?? [])
        frameBytes[image] = (frameBytes[image] ?? 0) + (lengths.get(at) ?? 0);
    }
  }
  return { frameBytes, dataClusters, cutClusters, tables };
}

/**
 * Bytes that the merged image will have, about: what is padded before tables of disks of many GiB is not counted.
 *
 * @param base the image whose bytes it begins with, if any: its index, and its length
 */
export function mergedLength(
  { frameBytes, tables }: MergeMeasure,
  disk: { readonly virtualSize: number; readonly clusterSize: number },
  base?: { readonly index: number; readonly length: number },
): number {
  const { virtualSize, clusterSize } = disk;
  const copied = frameBytes.reduce((sum, bytes, image) => (image === base?.index ? sum : sum + bytes), 0);
  const l1 = roundUp(l1EntriesFor(virtualSize, clusterSize) * ENTRY_BYTES, clusterSize);
  const data = roundUp((base?.length ?? clusterSize) + copied, clusterSize);
  const position = data + tables * clusterSize + l1;
  return position + refcountClusters(position, clusterSize) * clusterSize;
}
