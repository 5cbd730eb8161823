import { describe, expect, it } from "vitest";
import { MemoryImage, overlay, resized, writeTo, type ImagePlan } from "../../test/support/qcow2.js";
import { KiB } from "../bytes/index.js";
import { ImageChain, ImageReader, type ChainMapping } from "./index.js";

const CLUSTER = 4 * KiB;

async function reader(clusters: number, steps: ImagePlan["steps"]): Promise<ImageReader> {
  const sink = new MemoryImage(CLUSTER);
  await writeTo(sink, { virtualSize: clusters * CLUSTER, clusterSize: CLUSTER, steps });
  return await ImageReader.open(sink, { name: `image of ${clusters} clusters` });
}

async function collect(chain: ImageChain): Promise<ChainMapping[]> {
  const runs: ChainMapping[] = [];
  for await (const run of chain.map(0, chain.virtualSize)) runs.push(run);
  return runs;
}

const data = (cluster: number, fill: number): readonly [number, Buffer] => [
  cluster,
  Buffer.alloc(CLUSTER, fill),
];

describe("ImageChain.map()", () => {
  it("resolves runs down the chain, and joins what is zero", async () => {
    const base = await reader(
      8,
      [0, 1, 2, 3, 6, 7].map((cluster) => data(cluster, 1)),
    );
    const top = await reader(8, [data(0, 2), [1, "zero"], [5, "zero"]]);
    const runs = await collect(ImageChain.of([top, base]));
    expect(
      runs.map((run) => [
        run.kind,
        run.offset / CLUSTER,
        run.length / CLUSTER,
        "image" in run ? run.image : -1,
      ]),
    ).toEqual([
      ["compressed", 0, 1, 0],
      ["zero", 1, 1, -1],
      ["compressed", 2, 1, 1],
      ["compressed", 3, 1, 1],
      ["zero", 4, 2, -1],
      ["compressed", 6, 1, 1],
      ["compressed", 7, 1, 1],
    ]);
  });

  it("reads zeroes beyond the end of a shorter backing image, whatever lies below that one", async () => {
    const layers: [number, ImagePlan["steps"]][] = [
      [4, [0, 1, 2, 3].map((cluster) => data(cluster, 1))],
      [1.125, []],
      [4, [data(3, 3)]],
    ];
    let model: Buffer = Buffer.alloc(0);
    const images: ImageReader[] = [];
    for (const [clusters, steps] of layers) {
      model = resized(model, clusters * CLUSTER);
      overlay(model, CLUSTER, steps);
      images.unshift(await reader(clusters, steps));
    }
    const chain = ImageChain.of(images);
    expect((await chain.read(0, chain.virtualSize)).equals(model)).toBe(true);
    expect(
      (await collect(chain)).map((run) => [run.kind, run.offset / CLUSTER, run.length / CLUSTER]),
    ).toEqual([
      ["compressed", 0, 1],
      ["compressed", 1, 0.125],
      ["zero", 1.125, 1.875],
      ["compressed", 3, 1],
    ]);
  });

  it("asks an image below once for a run, however many runs the top has", async () => {
    const base = await reader(512, []);
    let calls = 0;
    const runAt = base.runAt.bind(base);
    base.runAt = (...args) => {
      calls += 1;
      return runAt(...args);
    };
    const top = await reader(
      512,
      Array.from({ length: 128 }, (_, i) => [i * 4, "zero"] as const),
    );
    expect(await collect(ImageChain.of([top, base]))).toHaveLength(1);
    expect(calls).toBe(1);
  });
});

describe("ImageChain.read()", () => {
  it("names the image whose cluster is damaged", async () => {
    const sink = new MemoryImage(CLUSTER);
    await writeTo(sink, { virtualSize: CLUSTER, clusterSize: CLUSTER, steps: [data(0, 1)] });
    sink.bytes[CLUSTER + 10]! ^= 1;
    const chain = ImageChain.of([await ImageReader.open(sink, { name: "web/p/vda.qcow2" })]);
    await expect(chain.read(0, 1)).rejects.toMatchObject({
      code: "TM_CLUSTER_DAMAGED",
      damage: { object: "web/p/vda.qcow2" },
    });
  });

  it("refuses a range beyond the disk, and a chain without images", async () => {
    const chain = ImageChain.of([await reader(2, [])]);
    await expect(chain.read(CLUSTER, 2 * CLUSTER)).rejects.toMatchObject({ code: "TM_USAGE" });
    expect(() => ImageChain.of([])).toThrow(expect.objectContaining({ code: "TM_USAGE" }));
  });
});
