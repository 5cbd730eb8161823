import type { IoOptions } from "../bytes/index.js";
import type { ImageReader } from "./reader.js";

/**
 * Bytes of the frames that an image has of clusters `first` to `end`, by where they lie. An L2 entry counts sectors, but
 * frames lie side by side: each ends, at the latest, where the next one begins. Where nothing that is referred to follows
 * at once (tables, padding, garbage), the last sector counts as a whole.
 */
export async function frameLengths(
  reader: ImageReader,
  first: number,
  end: number,
  options: IoOptions = {},
): Promise<ReadonlyMap<number, number>> {
  const size = reader.clusterSize;
  const stop = Math.min(end * size, reader.virtualSize);
  const frames: { readonly at: number; readonly storedLength: number }[] = [];
  for (let offset = first * size; offset < stop;) {
    const found = reader.runAt(offset, stop, options);
    const run = found instanceof Promise ? await found : found;
    if (run.kind === "compressed") frames.push(run);
    offset += run.length;
  }
  frames.sort((a, b) => a.at - b.at);
  const next = (index: number): number => frames[index + 1]?.at ?? Infinity;
  return new Map(frames.map(({ at, storedLength }, index) => [at, Math.min(storedLength, next(index) - at)]));
}
