import { randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import { MemoryImage, writeTo, type ImagePlan } from "../../test/support/qcow2.js";
import { KiB } from "../bytes/index.js";
import { FrameEncoder, frameBound, ImageChain, ImageReader, measureReads } from "./index.js";

const CLUSTER = 4 * KiB;
const SECTOR = 512;

async function reader(clusters: number, steps: ImagePlan["steps"]): Promise<ImageReader> {
  const sink = new MemoryImage(CLUSTER);
  await writeTo(sink, { virtualSize: clusters * CLUSTER, clusterSize: CLUSTER, steps });
  return await ImageReader.open(sink);
}

/** Bytes of frames, as they are stored. */
function stored(...contents: readonly Buffer[]): number {
  const room = Buffer.alloc(frameBound(CLUSTER));
  return contents.reduce((sum, content) => sum + new FrameEncoder(3).encode(content, room, 0), 0);
}

describe("measureReads()", () => {
  it("counts the frames that the disk shows, image by image, and none that a later image hides", async () => {
    const content = Array.from({ length: 8 }, (_, index) =>
      index % 2 === 0 ? randomBytes(CLUSTER) : Buffer.alloc(CLUSTER, index),
    );
    const [a, b, c, d, e, f, g, h] = content as [
      Buffer,
      Buffer,
      Buffer,
      Buffer,
      Buffer,
      Buffer,
      Buffer,
      Buffer,
    ];
    const base = await reader(6, [
      [0, a],
      [1, b],
      [2, c],
      [3, d],
      [4, e],
      [5, f],
    ]);
    const middle = await reader(6, [
      [1, "zero"],
      [2, g],
    ]);
    const top = await reader(5, [[0, h]]);
    const reads = await measureReads(ImageChain.of([top, middle, base]));
    const exact = [stored(h), stored(g), stored(d, e)];
    // The table counts sectors: only of the last frame of each run is the length not told exactly.
    for (const [index, length] of exact.entries()) {
      expect(reads[index]).toBeGreaterThanOrEqual(length);
      expect(reads[index]).toBeLessThan(length + SECTOR);
    }
  });

  it("is exact to a sector however many small frames follow one another", async () => {
    const tiny = Array.from({ length: 300 }, (_, index): [number, Buffer] => [
      index,
      Buffer.alloc(CLUSTER, index + 1),
    ]);
    const [bytes] = await measureReads(ImageChain.of([await reader(300, tiny)]));
    const exact = stored(...tiny.map(([, content]) => content));
    expect(exact).toBeLessThan(300 * 64);
    expect(bytes).toBeGreaterThanOrEqual(exact);
    expect(bytes).toBeLessThan(exact + SECTOR);
  });

  it("counts nothing for a disk of zeroes, and ends when it is aborted", async () => {
    const chain = ImageChain.of([await reader(100, [[3, "zero"]])]);
    expect(await measureReads(chain)).toEqual([0]);
    await expect(measureReads(chain, { signal: AbortSignal.abort(new Error("enough")) })).rejects.toThrow(
      "enough",
    );
  });
});
