import { describe, expect, it } from "vitest";
import { DEFAULT_CLUSTER_SIZE, PlainImageWriter } from "../../src/qcow2/index.js";
import { checkImage, CLEAN, compareImages, createImage, imageInfo, qemuIo } from "../support/image.js";
import { FileSink } from "../support/qcow2.js";
import { temporaryDirectory } from "../support/temporary.js";

const KiB = 1024;
const GiB = 1024 ** 3;

describe("PlainImageWriter", () => {
  it.each<[string, number, [number, number][]]>([
    ["0 bytes", 0, []],
    ["512 bytes", 512, [[0, 512]]],
    ["no data", GiB, []],
    [
      "not a multiple of the cluster",
      300 * KiB + 512,
      [
        [5 * KiB, 100 * KiB],
        [300 * KiB, 512],
      ],
    ],
    [
      "1 TiB",
      1024 * GiB,
      [
        [0, 512],
        [512 * KiB * KiB - 1024, 70 * KiB],
        [1024 * GiB - 512, 512],
      ],
    ],
  ])("writes what qemu-img checks clean and reads alike: %s", async (_title, size, runs) => {
    await using directory = await temporaryDirectory();
    const path = directory.file("plain.qcow2");
    const writer = PlainImageWriter.create(await FileSink.create(path, DEFAULT_CLUSTER_SIZE), size);
    for (const [offset, length] of runs) await writer.write(offset, Buffer.alloc(length, 0xa5));
    await writer.finish();

    expect(await checkImage(path)).toMatchObject(CLEAN);
    expect(await imageInfo(path)).toMatchObject({ format: "qcow2", "virtual-size": size });
    const model = await createImage(directory.file("model.qcow2"), "qcow2", size);
    if (runs.length > 0)
      await qemuIo(
        model,
        "qcow2",
        runs.map(([offset, length]) => `write -P 0xa5 ${offset} ${length}`),
      );
    expect(await compareImages({ path, format: "qcow2" }, { path: model, format: "qcow2" })).toBe(
      "identical",
    );
  });

  it("writes an image that QEMU goes on with", async () => {
    await using directory = await temporaryDirectory();
    const path = directory.file("plain.qcow2");
    const writer = PlainImageWriter.create(await FileSink.create(path, DEFAULT_CLUSTER_SIZE), GiB);
    await writer.write(0, Buffer.alloc(100 * KiB, 1));
    await writer.finish();
    await qemuIo(path, "qcow2", [
      "write -P 2 50k 200k",
      "write -P 3 900M 64k",
      "discard 0 64k",
      "read -P 2 64k 186k",
    ]);
    expect(await checkImage(path)).toMatchObject(CLEAN);
  });

  it("write() refuses to go back, and to leave the disk", async () => {
    await using directory = await temporaryDirectory();
    const sink = await FileSink.create(directory.file("plain.qcow2"), DEFAULT_CLUSTER_SIZE);
    const writer = PlainImageWriter.create(sink, 8 * KiB);
    await writer.write(1024, Buffer.alloc(1024, 1));
    await expect(writer.write(1024, Buffer.alloc(1))).rejects.toThrow("out of order");
    await expect(writer.write(8 * KiB - 1, Buffer.alloc(2))).rejects.toThrow("beyond the disk");
    await writer.abort();
  });
});
