import { createHash, randomBytes } from "node:crypto";
import { open, readFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { GiB, KiB, MiB, TiB } from "../../src/bytes/index.js";
import { digestOfSegments, ImageWriter, type ImageSummary } from "../../src/qcow2/index.js";
import { checkImage, CLEAN, imageInfo, imageMap, sha256OfFile, toRaw } from "../support/image.js";
import {
  clusterContent,
  encodeBatch,
  FileSink,
  IDENTITY,
  overlay,
  resized,
  writeImage,
  type ImagePlan,
} from "../support/qcow2.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const CLUSTER_SIZES = [64 * KiB, 256 * KiB, 2 * MiB];
type Step = ImagePlan["steps"][number];

/** Segments must cover the file without gaps, the header last, and carry the digests of its bytes. */
async function expectSegments(path: string, summary: ImageSummary, clusterSize: number): Promise<void> {
  const bytes = await readFile(path);
  expect(bytes.length).toBe(summary.length);
  const { segments } = summary;
  let next = clusterSize;
  for (const segment of segments.slice(0, -1)) {
    expect(segment.offset).toBe(next);
    if (segment.kind === "table")
      expect([segment.offset % clusterSize, segment.length % clusterSize]).toEqual([0, 0]);
    next += segment.length;
  }
  expect(next).toBe(bytes.length);
  expect(segments.at(-1)).toMatchObject({ offset: 0, length: clusterSize, kind: "header" });
  const digests = segments.map(({ offset, length }) =>
    createHash("sha256")
      .update(bytes.subarray(offset, offset + length))
      .digest(),
  );
  expect(segments.map((segment) => segment.sha256)).toEqual(digests.map((digest) => digest.toString("hex")));
  expect(summary.sha256).toBe(createHash("sha256").update(Buffer.concat(digests)).digest("hex"));
  expect(digestOfSegments(segments)).toBe(summary.sha256);
}

/** Compares an image with its model through `qemu-img convert`, after `qemu-img check`. */
async function expectImage(path: string, model: Buffer): Promise<void> {
  const { report, ...found } = await checkImage(path);
  expect(found, report).toEqual(CLEAN);
  expect(await sha256OfFile(await toRaw(path, "qcow2", `${path}.raw`))).toBe(
    createHash("sha256").update(model).digest("hex"),
  );
}

describe.each(CLUSTER_SIZES)("ImageWriter with clusters of %i bytes", (clusterSize) => {
  it.each([
    ["0 bytes", 0],
    ["512 bytes", 512],
    ["one cluster", clusterSize],
    ["5 clusters and 1.5 KiB", 5 * clusterSize + 1536],
  ])("writes a disk of %s that check and convert agree to", async (_, virtualSize) => {
    await using directory = await temporaryDirectory();
    const clusters = Math.ceil(virtualSize / clusterSize);
    const steps: Step[] = [];
    for (let cluster = clusters - 1; cluster >= 0; cluster -= 1) {
      steps.push([cluster, cluster === 1 ? "zero" : clusterContent(clusterSize, cluster, 0)]);
    }
    const path = directory.file("disk.qcow2");
    const summary = await writeImage(path, { virtualSize, clusterSize, steps });
    const model = Buffer.alloc(virtualSize);
    overlay(model, clusterSize, steps);
    await expectImage(path, model);
    await expectSegments(path, summary, clusterSize);
    expect(await imageInfo(path, "qcow2")).toMatchObject({
      "virtual-size": virtualSize,
      "cluster-size": clusterSize,
      "format-specific": { data: { compat: "1.1", "compression-type": "zstd", "refcount-bits": 16 } },
    });
  });

  it.each([1 * TiB, 16 * TiB])(
    "writes a sparse disk of %i bytes that convert and map read",
    async (virtualSize) => {
      await using directory = await temporaryDirectory();
      const path = directory.file("disk.qcow2");
      const last = virtualSize / clusterSize - 1;
      const written = [last, 0, Math.floor(last / 2), 7];
      const summary = await writeImage(path, {
        virtualSize,
        clusterSize,
        steps: [
          ...written.map((cluster): Step => [cluster, clusterContent(clusterSize, cluster, 0)]),
          [9, "zero"],
          [last, "seal"],
        ],
      });
      expect(summary).toMatchObject({ dataClusters: 4, zeroClusters: 1 });
      const { report, ...found } = await checkImage(path);
      expect(found, report).toEqual(CLEAN);
      const map = await imageMap(path, "qcow2");
      const data = map.filter((range) => range.data).map((range) => [range.start, range.length]);
      expect(data).toEqual(
        written.sort((a, b) => a - b).map((cluster) => [cluster * clusterSize, clusterSize]),
      );
      const [first] = written;
      for (const cluster of [first!, last]) {
        const tail = directory.file(`at-${cluster}.raw`);
        const part = `driver=raw,offset=${cluster * clusterSize},size=${clusterSize}`;
        const image = `file.driver=qcow2,file.file.driver=file,file.file.filename=${path}`;
        await run("qemu-img", ["convert", "-O", "raw", "--image-opts", `${part},${image}`, tail]);
        expect((await readFile(tail)).equals(clusterContent(clusterSize, cluster, 0))).toBe(true);
      }
    },
  );

  it("writes chains of three, backing files shorter and longer, that convert reads like the model", async () => {
    await using directory = await temporaryDirectory();
    const sizes = [9 * clusterSize, 4 * clusterSize + 512, 8 * clusterSize + 1024];
    const layers: Step[][] = [
      [0, 1, 2, 3, 4, 5, 6, 8].map((cluster) => [cluster, clusterContent(clusterSize, cluster, 0)]),
      [
        [4, clusterContent(clusterSize, 4, 1)],
        [1, "zero"],
        [2, clusterContent(clusterSize, 2, 1)],
      ],
      [
        [2, "zero"],
        [6, clusterContent(clusterSize, 6, 2)],
        [8, clusterContent(clusterSize, 8, 2)],
        [3, "zero"],
      ],
    ];
    let model: Buffer = Buffer.alloc(0);
    for (const [layer, steps] of layers.entries()) {
      const virtualSize = sizes[layer]!;
      const path = directory.file(`${layer}.qcow2`);
      const backing = layer === 0 ? undefined : `${layer - 1}.qcow2`;
      await writeImage(path, { virtualSize, clusterSize, backing, steps });
      model = resized(model, virtualSize);
      overlay(model, clusterSize, steps);
      await expectImage(path, model);
      if (layer > 0) expect((await imageInfo(path, "qcow2"))["backing-filename"]).toBe(backing);
    }
  });
});

describe("ImageWriter", () => {
  it("fills a disk of 64 MiB out of order, seals in between, and cuts segments of at least five eighths", async () => {
    await using directory = await temporaryDirectory();
    const clusterSize = 4 * KiB;
    const virtualSize = 64 * MiB;
    const clusters = virtualSize / clusterSize;
    const segmentBytes = 64 * KiB;
    const model = Buffer.concat([
      randomBytes(virtualSize / 4),
      Buffer.alloc((virtualSize * 3) / 4, "tidemark"),
    ]);
    const path = directory.file("disk.qcow2");
    const writer = ImageWriter.create(await FileSink.create(path, clusterSize), {
      ...{ virtualSize, clusterSize, segmentBytes, identity: IDENTITY },
    });
    const window = 96; // neither a batch nor a table: seals fall everywhere
    for (let start = 0; start < clusters; start += window) {
      const order = Array.from({ length: window }, (_, i) => start + ((i * 35) % window)).filter(
        (cluster) => cluster < clusters,
      );
      const batches = [order.slice(0, 40), order.slice(40)].map((part) =>
        encodeBatch(
          part.map((cluster) => [
            cluster,
            model.subarray(cluster * clusterSize, (cluster + 1) * clusterSize),
          ]),
        ),
      );
      await Promise.all(batches.map((batch) => writer.append(batch)));
      await writer.seal(start + window);
    }
    const summary = await writer.finish();
    expect(summary).toMatchObject({ dataClusters: clusters, zeroClusters: 0 });
    await expectImage(path, model);
    await expectSegments(path, summary, clusterSize);
    for (const kind of ["data", "table"] as const) {
      const lengths = summary.segments.filter((segment) => segment.kind === kind).map(({ length }) => length);
      expect(lengths.length).toBeGreaterThan(1);
      expect(Math.min(...lengths.slice(0, -1))).toBeGreaterThanOrEqual((segmentBytes * 5) / 8);
      expect(Math.max(...lengths)).toBeLessThanOrEqual(segmentBytes + 2 * clusterSize);
    }
  });

  it("counts references over several refcount blocks and a refcount table of two clusters", async () => {
    await using directory = await temporaryDirectory();
    // 4 KiB clusters: a block describes 8 MiB of the file, one cluster of the refcount table 4 GiB.
    const clusterSize = 4 * KiB;
    const bytes = 4 * GiB + 40 * MiB;
    const frame = encodeBatch([[0, randomBytes(clusterSize)]]);
    const each = frame.payload.length;
    const count = Math.ceil(bytes / each);
    const batch = 4096;
    const payload = Buffer.concat(Array.from({ length: batch }, () => frame.payload));
    const path = directory.file("disk.qcow2");
    // The frames are left out of the file, which stays a hole there: check reads tables and refcounts alone.
    const sink = await FileSink.create(path, clusterSize, (part) => part.buffer === payload.buffer);
    const virtualSize = Math.ceil(count / batch) * batch * clusterSize;
    const writer = ImageWriter.create(sink, {
      ...{ virtualSize, clusterSize, segmentBytes: 256 * KiB, identity: IDENTITY },
    });
    for (let start = 0; start < count; start += batch) {
      const frames = Array.from({ length: batch }, (_, i) => ({ cluster: start + i, length: each }));
      await writer.append({ payload, frames });
      await writer.seal(start + batch);
    }
    const summary = await writer.finish();
    expect(summary.length).toBeGreaterThan(4 * GiB);
    expect(summary.segments.filter((segment) => segment.kind === "table").length).toBeGreaterThan(1);
    const header = Buffer.alloc(112);
    await using file = await open(path, "r");
    await file.read(header, 0, header.length, 0);
    expect(header.readUInt32BE(56)).toBe(2); // refcount_table_clusters
    // Blocks left memory on the way: each lies not far behind what it describes, in a file of more than 4 GiB.
    const table = Buffer.alloc(2 * clusterSize);
    await file.read(table, 0, table.length, Number(header.readBigUInt64BE(48)));
    const blocks = Array.from({ length: table.length / 8 }, (_, index) =>
      Number(table.readBigUInt64BE(index * 8)),
    ).filter((offset) => offset !== 0);
    expect(blocks.length).toBeGreaterThan(512);
    const described = (clusterSize / 2) * clusterSize;
    const lags = blocks.map((offset, index) => offset - (index + 1) * described);
    expect(Math.max(...lags)).toBeLessThan(256 * MiB);
    const { report, ...found } = await checkImage(path);
    expect(found, report).toEqual(CLEAN);
  });

  it("lets the tables of a discarded disk leave in segments before it is finished, in bounded memory", async () => {
    await using directory = await temporaryDirectory();
    const clusterSize = 64 * KiB;
    const virtualSize = 1 * TiB;
    const path = directory.file("disk.qcow2");
    // All zero clusters but one: 128 MiB of L2 tables behind a data segment that stays short and is padded.
    const writer = ImageWriter.create(await FileSink.create(path, clusterSize), {
      ...{ virtualSize, clusterSize, identity: IDENTITY },
    });
    const before = process.memoryUsage().arrayBuffers;
    await writer.append(encodeBatch([[8192 * 1024, clusterContent(clusterSize, 0, 0)]]));
    writer.zero(0, 8192 * 1024);
    writer.zero(8192 * 1024 + 1, virtualSize / clusterSize - 8192 * 1024 - 1);
    await writer.seal(virtualSize / clusterSize);
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(32 * MiB);
    const summary = await writer.finish();
    expect(summary).toMatchObject({ dataClusters: 1, zeroClusters: virtualSize / clusterSize - 1 });
    const [data, ...rest] = summary.segments;
    expect(data).toMatchObject({ kind: "data", length: 5 * MiB });
    expect(rest.slice(0, -2).map((segment) => segment.length)).toEqual(rest.slice(0, -2).map(() => 8 * MiB));
    const { report, ...found } = await checkImage(path);
    expect(found, report).toEqual(CLEAN);
    const map = await imageMap(path, "qcow2");
    expect(map.filter((range) => range.data).map((range) => [range.start, range.length])).toEqual([
      [8192 * 1024 * clusterSize, clusterSize],
    ]);
  });

  it("agrees with nbdinfo on what is zero and what is data, over a parent that holds data", async () => {
    await using directory = await temporaryDirectory();
    const clusterSize = 64 * KiB;
    const virtualSize = 6 * clusterSize;
    const all = [0, 1, 2, 3, 4].map((cluster): Step => [cluster, clusterContent(clusterSize, cluster, 0)]);
    await writeImage(directory.file("full.qcow2"), { virtualSize, clusterSize, steps: all });
    const path = directory.file("increment.qcow2");
    await writeImage(path, {
      ...{ virtualSize, clusterSize, backing: "full.qcow2" },
      steps: [
        [1, "zero"],
        [2, "zero"],
        [4, clusterContent(clusterSize, 4, 1)],
      ],
    });
    const { stdout } = await run("nbdinfo", [
      ...["--map", "--json", "--", "["],
      ...["qemu-nbd", "-r", "-f", "qcow2", path, "]"],
    ]);
    const extents = JSON.parse(stdout) as { offset: number; length: number; type: number }[];
    const isZero = (cluster: number): boolean =>
      extents.some(({ offset, length, type }) => {
        const at = cluster * clusterSize;
        return (type & 2) !== 0 && at >= offset && at < offset + length;
      });
    expect([0, 1, 2, 3, 4, 5].map(isZero)).toEqual([false, true, true, false, false, true]);
  });

  it("writes frames that QEMU refuses to read when a byte of one is flipped", async () => {
    await using directory = await temporaryDirectory();
    const clusterSize = 64 * KiB;
    const path = directory.file("disk.qcow2");
    await writeImage(path, { virtualSize: clusterSize, clusterSize, steps: [[0, randomBytes(clusterSize)]] });
    await using file = await open(path, "r+");
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, clusterSize + 1000);
    await file.write(Buffer.from([byte[0]! ^ 1]), 0, 1, clusterSize + 1000);
    const converted = await run("qemu-img", ["convert", "-O", "raw", path, directory.file("x.raw")], {
      codes: [0, 1],
    });
    expect(converted.code).toBe(1);
    expect(converted.stderr).toMatch(/Input\/output error/);
  });
});
