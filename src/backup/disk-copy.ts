import { MiB } from "../bytes/index.js";
import { endOf, totalLength, type Extent } from "../extent/index.js";
import { anySignal, step, type Budget, type RateLimit } from "../flow/index.js";
import { ExpectedClusters, type HashWindow } from "../hashes/index.js";
import type { FrameReader } from "../transfer/index.js";
import type { DiskWriter } from "./disk-writer.js";
import {
  bytesToRead,
  packUnits,
  planningRanges,
  planRange,
  type DiskShape,
  type RangeFacts,
} from "./plan.js";

/** Bytes of a unit of work: what a worker reads, compresses and hands over at once. */
export const UNIT_BYTES = 2 * MiB;

/** A frozen disk and the image that it goes to. */
export interface DiskCopy extends DiskShape {
  /** Index of the disk's export in the FrameReader. */
  readonly export: number;
  readonly writer: DiskWriter;
  /** Key of the hashes to make; undefined: none. */
  readonly hashKey: Buffer | undefined;
  /** Whether clusters that read as zero must be stored: in an increment they cover the parent's data. */
  readonly storeZeroes: boolean;
  /** Looks up a range; asked in order, one at a time. */
  readonly facts: (range: Extent) => Promise<RangeFacts>;
  /** Looks up what the parent holds of clusters, to store only what differs; undefined: all that is read is stored. */
  readonly expected?: ((first: number, count: number) => Promise<HashWindow>) | undefined;
  readonly onProgress: (bytesDone: number) => void;
}

/** What all disks of a backup share. */
export interface CopyResources {
  readonly reader: FrameReader;
  /** Bytes read and not yet written, over all disks. */
  readonly inFlight: Budget;
  readonly bandwidth: RateLimit;
  readonly signal: AbortSignal;
}

/** Bytes of a disk that will be read: one look at the maps alone. */
export async function measureCopy(
  copy: Pick<DiskCopy, "virtualSize" | "clusterSize" | "facts">,
  signal: AbortSignal,
): Promise<number> {
  let bytes = 0;
  for (const range of planningRanges(copy)) {
    signal.throwIfAborted();
    bytes += bytesToRead(planRange(range, await copy.facts(range), copy));
  }
  return bytes;
}

/**
 * Copies a frozen disk into its image: plans range by range, reads and compresses on the workers, appends
 * in order of completion. Returns when every unit is appended; the image is not finished.
 *
 * @throws the first error of any unit, after all units under way have ended
 */
export async function copyDisk(copy: DiskCopy, resources: CopyResources): Promise<void> {
  const failure = new AbortController();
  const signal = anySignal(resources.signal, failure.signal);
  /** Units under way by their first cluster, in planning order: the first one is the lowest. */
  const underWay = new Map<number, Promise<void>>();
  let done = 0;

  const copyUnit = async (
    extents: readonly Extent[],
    bytes: number,
    window: HashWindow | undefined,
  ): Promise<void> => {
    try {
      const { payload, used, frames, hashes, zeros } = await resources.reader.read({
        export: copy.export,
        extents,
        clusterSize: copy.clusterSize,
        hashKey: copy.hashKey,
        expected: window && ExpectedClusters.pack(window, clustersOf(extents, copy.clusterSize)),
      });
      signal.throwIfAborted();
      if (copy.storeZeroes) for (const cluster of zeros) copy.writer.zero(cluster, 1);
      if (frames.length > 0)
        await copy.writer.append({ payload: new Uint8Array(payload, 0, used), frames, hashes });
      resources.reader.recycle(payload);
      done += bytes;
      copy.onProgress(done);
      await step("reading");
    } catch (error) {
      failure.abort(error);
    } finally {
      resources.inFlight.give(bytes);
    }
  };

  try {
    for (const range of planningRanges(copy)) {
      signal.throwIfAborted();
      const plan = planRange(range, await copy.facts(range), copy);
      for (const { offset, length } of plan.zero) {
        const first = offset / copy.clusterSize;
        copy.writer.zero(first, Math.ceil(length / copy.clusterSize));
      }
      const window = plan.read.length === 0 ? undefined : await expectedOf(copy, range);
      for (const extents of packUnits(plan.read, UNIT_BYTES)) {
        const bytes = totalLength(extents);
        await resources.bandwidth.pass(bytes, { signal });
        await resources.inFlight.take(bytes, { signal });
        const first = (extents[0]?.offset ?? 0) / copy.clusterSize;
        underWay.set(
          first,
          copyUnit(extents, bytes, window).finally(() => underWay.delete(first)),
        );
      }
      // What is planned and no longer under way will not be written again.
      const [lowest] = underWay.keys();
      await copy.writer.seal(lowest ?? Math.ceil(endOf(range) / copy.clusterSize));
    }
  } catch (error) {
    failure.abort(error);
  }
  await Promise.all(underWay.values());
  signal.throwIfAborted();
}

/** What the parent holds of a range, where the disk is compared with it. */
async function expectedOf(
  { expected, clusterSize }: DiskCopy,
  { offset, length }: Extent,
): Promise<HashWindow | undefined> {
  return await expected?.(offset / clusterSize, Math.ceil(length / clusterSize));
}

/** Numbers of the clusters that a unit reads, in its order. */
function clustersOf(extents: readonly Extent[], clusterSize: number): number[] {
  return extents.flatMap(({ offset, length }) => {
    const first = offset / clusterSize;
    return Array.from({ length: Math.ceil(length / clusterSize) }, (_, index) => first + index);
  });
}
