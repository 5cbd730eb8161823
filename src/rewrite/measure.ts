import { hashesLength } from "../hashes/index.js";
import { measureMerge, mergedLength, type MergeMeasure } from "../qcow2/index.js";
import type { PointChain } from "../repository/index.js";
import type { ImageMerge } from "./plan.js";
import { openStack, type RewriteContext, type RewrittenImage } from "./stack.js";

/** Part of a new image that may be garbage; with more it is written without any. */
export const MOST_GARBAGE = 1 / 3;

/** An image that is to be written anew, and what that will move. */
export interface MeasuredMerge {
  readonly merge: ImageMerge;
  /** Index in the stack of the image whose bytes the new one begins with. */
  readonly base: number | undefined;
  /** Bytes of frames that each image of the stack gives. */
  readonly frameBytes: readonly number[];
  /** What will be moved; frames may count some bytes too many. */
  readonly expected: RewrittenImage;
  /** Bytes that the file of the new image's hashes will have, about. */
  readonly hashesBytes: number;
}

/** What writing images anew would move: read from their tables. Nothing is changed. */
export async function measureRewrites(
  merges: readonly ImageMerge[],
  context: RewriteContext,
): Promise<MeasuredMerge[]> {
  const measured: MeasuredMerge[] = [];
  for (const merge of merges) {
    measured.push(
      await openStack(merge, context, async (chain) => {
        const measure = await measureMerge(chain.chain, merge.stack.length, { signal: context.signal });
        return measuredOf(merge, chain, measure);
      }),
    );
  }
  return measured;
}

function measuredOf(merge: ImageMerge, chain: PointChain, measure: MergeMeasure): MeasuredMerge {
  const { frameBytes, dataClusters } = measure;
  const base = chooseBase(merge, chain, frameBytes);
  const baseBytes = base === undefined ? 0 : (chain.images[base]?.disk.bytes ?? 0);
  const begun = base === undefined ? undefined : { index: base, length: baseBytes };
  const copiedBytes = sumOf(frameBytes) - (base === undefined ? 0 : (frameBytes[base] ?? 0));
  const writtenBytes = mergedLength(measure, chain.disk, begun) - baseBytes;
  const hasHashes = chain.images.slice(0, merge.stack.length).every(({ disk }) => disk.hashes != null);
  return {
    merge,
    base,
    frameBytes,
    expected: { id: merge.point, disk: merge.disk, copiedBytes, writtenBytes, baseBytes },
    hashesBytes: hasHashes ? hashesLength(dataClusters, measure.tables) : 0,
  };
}

/**
 * The image whose bytes the new one begins with: the one that gives most. None, when too much of it would be garbage.
 *
 * @param live bytes that each would give
 * @returns its index
 */
function chooseBase({ stack }: ImageMerge, chain: PointChain, live: readonly number[]): number | undefined {
  // An image that is merged with none is written anew for the sake of its garbage.
  if (stack.length === 1) return undefined;
  const most = Math.max(...live);
  const base = live.indexOf(most);
  const held = (chain.images[base]?.disk.bytes ?? 0) - most;
  return held > (sumOf(live) + held) * MOST_GARBAGE ? undefined : base;
}

function sumOf(numbers: readonly number[]): number {
  return numbers.reduce((sum, number) => sum + number, 0);
}
