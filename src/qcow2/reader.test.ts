import { describe, expect, it } from "vitest";
import { encodeBatch, IDENTITY, MemoryImage, writeTo } from "../../test/support/qcow2.js";
import { KiB, type ByteSource } from "../bytes/index.js";
import { ImageChain, ImageReader, ImageWriter, type Mapping } from "./index.js";

const CLUSTER = 4 * KiB;

/** Three L2 tables: data in clusters 0, 1 and 1030, zero clusters 2 and 3, the middle table missing. */
async function image(): Promise<MemoryImage> {
  const sink = new MemoryImage(CLUSTER);
  await writeTo(sink, {
    virtualSize: 1100 * CLUSTER + 512,
    clusterSize: CLUSTER,
    steps: [
      ...[0, 1, 1030].map((cluster) => [cluster, Buffer.alloc(CLUSTER, (cluster % 255) + 1)] as const),
      ...[[2, "zero"] as const, [3, "zero"] as const],
    ],
  });
  return sink;
}

async function collect(reader: ImageReader, offset: number, length: number): Promise<Mapping[]> {
  const runs: Mapping[] = [];
  for await (const run of reader.map(offset, length)) runs.push(run);
  return runs;
}

/** Overwrites a 64-bit field. */
function patch(sink: MemoryImage, at: number, value: bigint): void {
  sink.bytes.writeBigUInt64BE(value, at);
}

const l1At = (sink: MemoryImage): number => Number(sink.bytes.readBigUInt64BE(40));
const l2At = (sink: MemoryImage): number =>
  Number(sink.bytes.readBigUInt64BE(l1At(sink)) & 0x00ff_ffff_ffff_fe00n);

describe("ImageReader.map()", () => {
  it("covers the disk with runs that cross tables, and clips them to the range", async () => {
    const reader = await ImageReader.open(await image());
    const runs = await collect(reader, 0, reader.virtualSize);
    expect(runs.map(({ offset, length, kind }) => [kind, offset / CLUSTER, length / CLUSTER])).toEqual([
      ["compressed", 0, 1],
      ["compressed", 1, 1],
      ["zero", 2, 2],
      ["unallocated", 4, 1026],
      ["compressed", 1030, 1],
      ["unallocated", 1031, 69 + 512 / CLUSTER],
    ]);
    expect(await collect(reader, CLUSTER + 100, 2 * CLUSTER)).toMatchObject([
      { kind: "compressed", offset: CLUSTER + 100, length: CLUSTER - 100, skip: 100 },
      { kind: "zero", offset: 2 * CLUSTER, length: CLUSTER + 100 },
    ]);
    expect(await collect(reader, 700 * CLUSTER, 0)).toEqual([]);
  });

  it("refuses a range beyond the disk", async () => {
    const reader = await ImageReader.open(await image());
    await expect(collect(reader, reader.virtualSize, 1)).rejects.toMatchObject({ code: "TM_USAGE" });
    await expect(collect(reader, -1, 1)).rejects.toMatchObject({ code: "TM_USAGE" });
  });

  it("ends with the signal's reason", async () => {
    const reader = await ImageReader.open(await image());
    const reason = new Error("enough");
    const map = reader.map(0, reader.virtualSize, { signal: AbortSignal.abort(reason) });
    await expect(map.next()).rejects.toBe(reason);
    await expect(ImageReader.open(await image(), { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });

  it("keeps no more tables in memory than its cache may hold", async () => {
    const sink = await image();
    const reads: number[] = [];
    const source: ByteSource = {
      length: sink.length,
      read: (offset, length) => {
        reads.push(offset);
        return sink.read(offset, length);
      },
    };
    for (const [cacheBytes, expected] of [
      [2 * CLUSTER, 2],
      [CLUSTER, 4],
    ] as const) {
      const reader = await ImageReader.open(source, { cacheBytes });
      reads.length = 0;
      for (let i = 0; i < 2; i += 1) {
        await collect(reader, 0, CLUSTER);
        await collect(reader, 1030 * CLUSTER, CLUSTER);
      }
      expect(reads.length).toBe(expected);
    }
  });

  it("bounds the stored length of the last frame by the end of the file", async () => {
    const sink = await image();
    const { payload } = encodeBatch([[0, Buffer.alloc(CLUSTER, 77)]]);
    const at = sink.length;
    await sink.append(payload);
    patch(sink, l2At(sink), 0x4000_0000_0000_0000n | BigInt(at));
    const reader = await ImageReader.open(sink);
    expect(await collect(reader, 0, 1)).toMatchObject([
      { kind: "compressed", at, storedLength: payload.length },
    ]);
    expect((await ImageChain.of([reader]).read(0, CLUSTER)).equals(Buffer.alloc(CLUSTER, 77))).toBe(true);
  });

  it.each<[string, (sink: MemoryImage) => void, RegExp]>([
    ["an L2 table beyond the file", (sink) => patch(sink, l1At(sink), 0x8000_00ff_ffff_f000n), /L1 entry 0/],
    [
      "an L2 table that the file's end cuts",
      (sink) => patch(sink, l1At(sink), BigInt(sink.length)),
      /L1 entry 0/,
    ],
    ["an L2 table inside a cluster", (sink) => patch(sink, l1At(sink), 0x8000_0000_0000_2200n), /L1 entry 0/],
    ["reserved bits in L1", (sink) => patch(sink, l1At(sink), 0x8000_0000_0000_2001n), /L1 entry 0/],
    [
      "a compressed cluster beyond the file",
      (sink) => patch(sink, l2At(sink), 0x4000_00ff_ffff_0000n),
      /L2 entry of cluster 0.*beyond the end/,
    ],
    [
      "a plain cluster beyond the file",
      (sink) => patch(sink, l2At(sink), 0x8000_00ff_ffff_0000n),
      /L2 entry of cluster 0.*beyond the end/,
    ],
    [
      "a plain cluster in the header",
      (sink) => patch(sink, l2At(sink) + 8, 0x4000_0000_0000_0100n),
      /L2 entry of cluster 1.*header/,
    ],
    [
      "reserved bits in L2",
      (sink) => patch(sink, l2At(sink) + 16, 0x8000_0000_0000_1002n),
      /L2 entry of cluster 2.*reserved/,
    ],
  ])("ends in a DamageError for %s", async (_, damage, message) => {
    const sink = await image();
    damage(sink);
    const reader = await ImageReader.open(sink, { name: "web/p/vda.qcow2" });
    const map = collect(reader, 0, reader.virtualSize);
    await expect(map).rejects.toMatchObject({
      code: "TM_IMAGE_DAMAGED",
      damage: { object: "web/p/vda.qcow2" },
    });
    await expect(map).rejects.toThrow(message);
  });

  it("ends in a DamageError for a plain cluster of which the file lacks bytes of the disk", async () => {
    const sink = await image();
    await sink.append(Buffer.alloc(1000));
    patch(sink, l2At(sink), 0x8000_0000_0000_0000n | BigInt(sink.length - 1000));
    const reader = await ImageReader.open(sink);
    expect(await collect(reader, 0, 1000)).toMatchObject([{ kind: "plain", length: 1000 }]);
    await expect(collect(reader, 0, 1001)).rejects.toMatchObject({ code: "TM_IMAGE_DAMAGED" });
  });
});

describe("ImageReader.open()", () => {
  it.each<[string, (sink: MemoryImage) => void]>([
    ["an L1 table with too few entries", (sink) => sink.bytes.writeUInt32BE(2, 36)],
    ["an L1 table above 32 MiB", (sink) => sink.bytes.writeUInt32BE(4 * 1024 * KiB + 1, 36)],
    ["an L1 table beyond the file", (sink) => patch(sink, 40, BigInt(sink.length))],
    ["an L1 table inside a cluster", (sink) => patch(sink, 40, BigInt(l1At(sink) + 512))],
    ["a disk larger than its L1 table maps", (sink) => patch(sink, 24, 1n << 52n)],
    ["an extension beyond the first cluster", (sink) => sink.bytes.writeUInt32BE(0xffff0000, 116)],
  ])("ends in a DamageError for %s", async (_, damage) => {
    const sink = await image();
    damage(sink);
    await expect(ImageReader.open(sink)).rejects.toMatchObject({ code: "TM_IMAGE_DAMAGED" });
  });

  it.each([0, 4, 71, 111, 500, CLUSTER])("ends in a DamageError for a file of %i bytes", async (length) => {
    const sink = await image();
    const source: ByteSource = {
      length,
      read: (at, count) =>
        at + count <= length ? sink.read(at, count) : Promise.reject(new Error("beyond the end")),
    };
    await expect(ImageReader.open(source)).rejects.toMatchObject({ code: "TM_IMAGE_DAMAGED" });
  });

  it("requires checksums of images that carry an identity", async () => {
    const sink = new MemoryImage(CLUSTER);
    const writer = ImageWriter.create(sink, {
      virtualSize: CLUSTER,
      clusterSize: CLUSTER,
      identity: IDENTITY,
    });
    await writer.append(encodeBatch([[0, Buffer.alloc(CLUSTER, 1)]]));
    await writer.finish();
    expect((await ImageReader.open(sink)).format).toEqual({
      clusterSize: CLUSTER,
      compression: "zstd",
      requireChecksum: true,
    });
  });
});
