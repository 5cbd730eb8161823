import { open, readFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { ImageChain, ImageReader, type Mapping } from "../../src/qcow2/index.js";
import { createImage, imageMap, qemuIo, toRaw, writeNoise } from "../support/image.js";
import { FileSource, openImages } from "../support/qcow2.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

/** Reads a chain, top first, and compares every byte with `qemu-img convert` of the top image. */
async function expectSameAsConvert(directory: TemporaryDirectory, paths: readonly string[]): Promise<void> {
  await using opened = await openImages(paths);
  const chain = ImageChain.of(opened.images);
  const expected = await readFile(await toRaw(paths[0]!, "qcow2", directory.file("expected.raw")));
  expect(chain.virtualSize).toBe(expected.length);
  const found = await chain.read(0, chain.virtualSize);
  expect(found.equals(expected)).toBe(true);
  // Ranges that begin and end anywhere.
  for (const [offset, length] of [
    [1, expected.length - 2],
    [expected.length / 3, expected.length / 5],
    [expected.length / 2 - 77, 154],
  ] as const) {
    const [start, count] = [Math.floor(offset), Math.floor(length)];
    const part = await chain.read(start, count);
    expect(part.equals(expected.subarray(start, start + count))).toBe(true);
  }
}

async function kindsOf(path: string): Promise<Map<number, Mapping["kind"]>> {
  await using source = await FileSource.open(path);
  const reader = await ImageReader.open(source);
  const kinds = new Map<number, Mapping["kind"]>();
  for await (const run of reader.map(0, reader.virtualSize)) {
    const end = run.offset + run.length;
    for (let at = run.offset; at < end; at += reader.clusterSize)
      kinds.set(at / reader.clusterSize, run.kind);
  }
  return kinds;
}

const CLUSTER_SIZES = [512, 4 * KiB, 64 * KiB, 2 * MiB];
const CELLS = CLUSTER_SIZES.flatMap((clusterSize) =>
  (["none", "zlib", "zstd"] as const).map((compression) => ({ clusterSize, compression })),
);

describe("ImageChain.read()", () => {
  it.each(CELLS)(
    "equals convert with clusters of $clusterSize bytes and compression $compression",
    async ({ clusterSize, compression }) => {
      await using directory = await temporaryDirectory();
      const noise = await writeNoise(directory.file("noise"), clusterSize, clusterSize);
      const create = {
        cluster_size: String(clusterSize),
        ...(compression === "zstd" ? { compression_type: "zstd" } : {}),
      };
      const flags = compression === "none" ? "" : "-c ";
      const write = (pattern: string, cluster: number): string =>
        `write ${flags}${pattern} ${cluster * clusterSize} ${clusterSize}`;

      // The backing file ends inside cluster 6; cluster 5 is an explicit zero cluster in it.
      const backing = await createImage(directory.file("base.qcow2"), "qcow2", 6.5 * clusterSize, { create });
      await qemuIo(backing, "qcow2", [
        ...[0, 1, 2, 3, 4].map((cluster) => write(`-P ${cluster + 1}`, cluster)),
        `write -z -u ${5 * clusterSize} ${clusterSize}`,
        `write -P 7 ${6 * clusterSize} ${clusterSize / 2}`,
      ]);
      const top = await createImage(directory.file("top.qcow2"), "qcow2", 9 * clusterSize, {
        create,
        backing: { path: backing, format: "qcow2" },
      });
      await qemuIo(top, "qcow2", [
        write("-P 101", 0),
        `write -z -u ${1 * clusterSize} ${clusterSize}`,
        `write -P 102 ${2 * clusterSize} ${clusterSize}`,
        `write -z ${2 * clusterSize} ${clusterSize}`,
        write(`-s ${noise}`, 4),
      ]);
      const kinds = await kindsOf(top);
      const data = compression === "none" ? "plain" : "compressed";
      // What does not compress, QEMU stores as it is.
      expect(Array.from({ length: 9 }, (_, cluster) => kinds.get(cluster))).toEqual([
        ...[data, "zero", "zero", "unallocated", "plain", "unallocated"],
        ...["unallocated", "unallocated", "unallocated"],
      ]);
      // Cluster 2 is a zero cluster that keeps its place in the file.
      const raw = await readFile(top);
      const l2 = Number(raw.readBigUInt64BE(Number(raw.readBigUInt64BE(40))) & 0x00fffffffffffe00n);
      expect(raw.readBigUInt64BE(l2 + 8) & 0x00fffffffffffe01n).toBe(1n);
      expect(raw.readBigUInt64BE(l2 + 16) & 0x00fffffffffffe00n).not.toBe(0n);
      await expectSameAsConvert(directory, [top, backing]);
    },
  );

  it.each(CLUSTER_SIZES)(
    "equals convert of a version 2 image with clusters of %i bytes",
    async (clusterSize) => {
      await using directory = await temporaryDirectory();
      const create = { compat: "0.10", cluster_size: String(clusterSize) };
      const size = 70 * clusterSize + 512;
      const backing = await createImage(directory.file("base.qcow2"), "qcow2", size, { create });
      await qemuIo(backing, "qcow2", [
        `write -P 5 0 ${3 * clusterSize}`,
        `write -c -P 6 ${4 * clusterSize} ${clusterSize}`,
      ]);
      const top = await createImage(directory.file("top.qcow2"), "qcow2", size, {
        create,
        backing: { path: backing, format: "qcow2" },
      });
      await qemuIo(top, "qcow2", [
        `write -P 7 ${clusterSize} ${clusterSize}`,
        `write -P 8 ${70 * clusterSize} 512`,
      ]);
      await expectSameAsConvert(directory, [top, backing]);
    },
  );

  it("equals convert where the images of a chain have different clusters, compressions and sizes", async () => {
    await using directory = await temporaryDirectory();
    const noise = await writeNoise(directory.file("noise"), 64 * KiB, 1);
    const layers = [
      { size: 3 * MiB, clusterSize: 64 * KiB, type: "zlib", seed: 3 },
      { size: 2 * MiB + 1536, clusterSize: 1 * MiB, type: "zstd", seed: 5 },
      { size: 4 * MiB + 512, clusterSize: 4 * KiB, type: "zlib", seed: 7 },
      { size: 3 * MiB + 512, clusterSize: 16 * KiB, type: "zstd", seed: 11 },
    ];
    const paths: string[] = [];
    for (const [index, { size, clusterSize, type, seed }] of layers.entries()) {
      const [below] = paths;
      const path = await createImage(directory.file(`${index}.qcow2`), "qcow2", size, {
        create: { cluster_size: String(clusterSize), compression_type: type },
        ...(below === undefined ? {} : { backing: { path: below, format: "qcow2" } }),
      });
      paths.unshift(path);
      const count = Math.floor(size / clusterSize);
      const commands: string[] = [];
      for (let cluster = 0; cluster < count; cluster += 1) {
        const place = `${cluster * clusterSize} ${clusterSize}`;
        const kind = (cluster * seed) % 13;
        if (kind === 0) commands.push(`write -z -u ${place}`);
        if (kind === 1) commands.push(`write -c -P ${index * 40 + (cluster % 40) + 1} ${place}`);
        if (kind === 2) commands.push(`write -s ${noise} ${place}`);
      }
      await qemuIo(path, "qcow2", commands);
    }
    await expectSameAsConvert(directory, paths);
  });

  it.each(["off", "metadata", "falloc", "full"])(
    "equals convert with preallocation %s",
    async (preallocation) => {
      await using directory = await temporaryDirectory();
      const path = await createImage(directory.file("disk.qcow2"), "qcow2", 1 * MiB + 512, {
        create: { cluster_size: "64k", preallocation },
      });
      await qemuIo(path, "qcow2", ["write -P 1 70000 100000", `write -P 2 ${1 * MiB} 512`]);
      await expectSameAsConvert(directory, [path]);
    },
  );

  it("equals convert of what convert -c wrote, and ignores internal snapshots and bitmaps", async () => {
    await using directory = await temporaryDirectory();
    const raw = await writeNoise(directory.file("noise.raw"), 1 * MiB, 4);
    const path = directory.file("disk.qcow2");
    await run("qemu-img", [
      "convert",
      "-c",
      "-f",
      "raw",
      "-O",
      "qcow2",
      "-o",
      "compression_type=zstd",
      raw,
      path,
    ]);
    await run("qemu-img", ["resize", "-q", path, "2M"]);
    await qemuIo(path, "qcow2", ["write -c -P 3 1m 64k"]);
    await run("qemu-img", ["snapshot", "-c", "before", path]);
    await qemuIo(path, "qcow2", ["write -P 4 0 64k", "write -c -P 9 1216k 64k"]);
    await run("qemu-img", ["bitmap", "--add", path, "changes"]);
    await expectSameAsConvert(directory, [path]);
  });

  it("agrees with qemu-img map on what is zero and what is data", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("disk.qcow2"), "qcow2", 2 * MiB);
    await qemuIo(path, "qcow2", [
      ...["write -P 1 0 128k", "write -c -P 2 256k 64k", "write -z 512k 192k", "write -P 3 1m 64k"],
      "write -z -u 64k 64k",
    ]);
    await using opened = await openImages([path]);
    const found: [number, number, boolean][] = [];
    for await (const { offset, length, kind } of ImageChain.of(opened.images).map(0, 2 * MiB)) {
      const isZero = kind === "zero";
      const last = found.at(-1);
      if (last?.[2] === isZero) last[1] += length;
      else found.push([offset, length, isZero]);
    }
    const expected: [number, number, boolean][] = [];
    for (const { start, length, zero } of await imageMap(path, "qcow2")) {
      const last = expected.at(-1);
      if (last?.[2] === zero) last[1] += length;
      else expected.push([start, length, zero]);
    }
    expect(found).toEqual(expected);
  });
});

describe("ImageReader.open()", () => {
  /** Makes an image and overwrites bytes of its header. */
  async function patched(
    directory: TemporaryDirectory,
    at: number,
    bytes: readonly number[],
  ): Promise<string> {
    const path = await createImage(directory.file("disk.qcow2"), "qcow2", 1 * MiB);
    await using file = await open(path, "r+");
    await file.write(Buffer.from(bytes), 0, bytes.length, at);
    return path;
  }
  const create =
    (settings: Readonly<Record<string, string>>) =>
    (directory: TemporaryDirectory): Promise<string> =>
      createImage(directory.file("disk.qcow2"), "qcow2", 1 * MiB, { create: settings });
  // Not LUKS: its key derivation measures the processor, and gives up on a busy one.
  const encrypted = async (directory: TemporaryDirectory): Promise<string> => {
    const path = directory.file("disk.qcow2");
    await run("qemu-img", [
      ...["create", "-q", "--object", "secret,id=key,data=secret", "-f", "qcow2"],
      ...["-o", "encrypt.format=aes,encrypt.key-secret=key", path, "1M"],
    ]);
    return path;
  };
  const dataFile = async (directory: TemporaryDirectory): Promise<string> =>
    create({ data_file: directory.file("data.raw") })(directory);
  const version1 = async (directory: TemporaryDirectory): Promise<string> => {
    const path = directory.file("disk.qcow");
    await run("qemu-img", ["create", "-q", "-f", "qcow", path, "1M"]);
    return path;
  };

  it.each<[string, (directory: TemporaryDirectory) => Promise<string>, RegExp]>([
    ["encryption", encrypted, /is encrypted/],
    ["an external data file", dataFile, /external data file/],
    ["extended L2 entries", create({ extended_l2: "on" }), /extended L2 entries/],
    ["the dirty bit", (directory) => patched(directory, 79, [1]), /marked dirty/],
    ["the corrupt bit", (directory) => patched(directory, 79, [2]), /marked corrupt/],
    ["an unknown incompatible bit", (directory) => patched(directory, 72, [0x80]), /0x8000000000000000/],
    ["version 1", version1, /qcow2 version 1/],
    ["version 4", (directory) => patched(directory, 4, [0, 0, 0, 4]), /qcow2 version 4/],
    [
      "an unknown compression type",
      (directory) =>
        patched(directory, 79, [8]).then(async (path) => {
          await using file = await open(path, "r+");
          await file.write(Buffer.from([2]), 0, 1, 104);
          return path;
        }),
      /compression type 2/,
    ],
  ])("refuses %s by name", async (_, make, message) => {
    await using directory = await temporaryDirectory();
    const path = await make(directory);
    await using source = await FileSource.open(path);
    await expect(ImageReader.open(source, { name: path })).rejects.toMatchObject({
      code: "TM_IMAGE_UNSUPPORTED",
      message: expect.stringMatching(message) as string,
    });
    await expect(ImageReader.open(source, { name: path })).rejects.toThrow(path);
  });
});
