import type { IoOptions } from "../bytes/index.js";
import { ChainWalk } from "./chain-walk.js";
import type { ImageChain } from "./chain.js";
import type { CompressedMapping } from "./mapping.js";

/**
 * How many stored bytes of data of each image reading the whole disk takes, told from the tables alone, in the order of
 * the images. An L2 entry counts sectors: where the next frame follows in the file the length is exact, else it
 * is up to a sector too long.
 *
 * @throws {DamageError} when a table contradicts the format or the file's length
 */
export async function measureReads(chain: ImageChain, options: IoOptions = {}): Promise<number[]> {
  const { images, virtualSize } = chain;
  const bytes = images.map(() => 0);
  const last: (CompressedMapping | undefined)[] = images.map(() => undefined);
  const add = (image: number, length: number): void => {
    bytes[image] = (bytes[image] ?? 0) + length;
  };
  const walk = new ChainWalk(images, virtualSize, options);
  for (let at = 0; at < virtualSize;) {
    options.signal?.throwIfAborted();
    const found = walk.runAt(at);
    const run = found instanceof Promise ? await found : found;
    at = run.offset + run.length;
    if (run.kind === "plain") add(run.image, run.length);
    if (run.kind !== "compressed") continue;
    const before = last[run.image];
    // Two parts of one cluster, parted by the end of an image above.
    if (before?.at === run.at) continue;
    if (before !== undefined) {
      const gap = run.at - before.at;
      add(run.image, gap > 0 && gap < before.storedLength ? gap : before.storedLength);
    }
    last[run.image] = run;
  }
  for (const [image, run] of last.entries()) if (run !== undefined) add(image, run.storedLength);
  return bytes;
}
