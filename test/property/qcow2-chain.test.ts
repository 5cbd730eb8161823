import { createHash } from "node:crypto";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { ImageChain } from "../../src/qcow2/index.js";
import { checkImage, CLEAN, sha256OfFile, toRaw } from "../support/image.js";
import { openImages, overlay, resized, writeImage, type ImagePlan } from "../support/qcow2.js";
import { fraction } from "../support/seed.js";
import { temporaryDirectory } from "../support/temporary.js";

type Content = "zero" | { readonly seed: number; readonly isNoise: boolean };

/** One image: its size in sectors, its clusters in windows that are sealed or not, and the size of its segments. */
interface Layer {
  readonly sectors: number;
  readonly segmentBytes: number;
  readonly windows: readonly {
    readonly writes: readonly { readonly place: number; readonly content: Content }[];
    readonly isSealed: boolean;
  }[];
}

const content = fc.oneof(
  fc.constant<Content>("zero"),
  fc.record({ seed: fc.nat(255), isNoise: fc.boolean() }),
);
const layer: fc.Arbitrary<Layer> = fc.record({
  // Up to 1,100 clusters of 4 KiB: the L2 tables of such clusters map 512 each.
  sectors: fc.oneof(fc.nat(64), fc.nat(1100 * 8)),
  segmentBytes: fc.constantFrom(1, 8 * KiB, 64 * KiB, 8192 * KiB),
  windows: fc.array(
    fc.record({
      writes: fc.array(fc.record({ place: fraction, content }), {
        maxLength: 8,
      }),
      isSealed: fc.boolean(),
    }),
    { minLength: 1, maxLength: 6 },
  ),
});

function bytesOf(content: Exclude<Content, "zero">, clusterSize: number): Buffer {
  if (!content.isNoise) return Buffer.alloc(clusterSize, content.seed);
  const block = createHash("sha512").update(String(content.seed)).digest();
  return Buffer.alloc(clusterSize, Buffer.concat([block, createHash("sha384").update(block).digest()]));
}

/** Places writes in their window, each cluster once, in the order in which they were drawn. */
function stepsOf(layer: Layer, clusterSize: number): ImagePlan["steps"] {
  const clusters = Math.ceil((layer.sectors * 512) / clusterSize);
  const width = clusters / layer.windows.length;
  const steps: [number, Buffer | "zero" | "seal"][] = [];
  const used = new Set<number>();
  for (const [index, { writes, isSealed }] of layer.windows.entries()) {
    const start = Math.floor(index * width);
    const end = Math.floor((index + 1) * width);
    for (const { place, content } of writes) {
      const cluster = start + Math.floor(place * (end - start));
      if (cluster >= end || used.has(cluster)) continue;
      used.add(cluster);
      steps.push([cluster, content === "zero" ? "zero" : bytesOf(content, clusterSize)]);
    }
    if (isSealed) steps.push([end, "seal"]);
  }
  return steps;
}

describe("ImageWriter and ImageChain", () => {
  it("agree with qemu-img and with a byte array on random chains", async () => {
    await using directory = await temporaryDirectory();
    let run = 0;
    const property = fc.asyncProperty(
      fc.array(layer, { minLength: 1, maxLength: 4 }),
      fc.constantFrom(4 * KiB, 64 * KiB),
      fc.array(fc.tuple(fraction, fraction), {
        minLength: 3,
        maxLength: 3,
      }),
      async (layers, clusterSize, ranges) => {
        run += 1;
        const paths: string[] = [];
        let model: Buffer = Buffer.alloc(0);
        for (const [index, layer] of layers.entries()) {
          const steps = stepsOf(layer, clusterSize);
          const path = directory.file(`${run}-${index}.qcow2`);
          await writeImage(path, {
            virtualSize: layer.sectors * 512,
            clusterSize,
            segmentBytes: layer.segmentBytes,
            backing: index === 0 ? undefined : `${run}-${index - 1}.qcow2`,
            steps,
          });
          const { report, ...found } = await checkImage(path);
          expect(found, report).toEqual(CLEAN);
          paths.unshift(path);
          model = resized(model, layer.sectors * 512);
          overlay(model, clusterSize, steps);
        }
        await using opened = await openImages(paths);
        const chain = ImageChain.of(opened.images);
        expect((await chain.read(0, chain.virtualSize)).equals(model)).toBe(true);
        for (const [a, b] of ranges) {
          const [start, end] = [Math.min(a, b), Math.max(a, b)].map((part) =>
            Math.floor(part * model.length),
          );
          const bytes = await chain.read(start!, end! - start!);
          expect(bytes.equals(model.subarray(start, end))).toBe(true);
        }
        expect(await sha256OfFile(await toRaw(paths[0]!, "qcow2", directory.file(`${run}.raw`)))).toBe(
          createHash("sha256").update(model).digest("hex"),
        );
      },
    );
    await fc.assert(property, { numRuns: 40 });
  });
});
