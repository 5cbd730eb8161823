import { writeFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import {
  checkImage,
  CLEAN,
  compareImages,
  createImage,
  imageInfo,
  imageMap,
  patternBytes,
  patternCommands,
  qemuIo,
  sha256OfDisk,
  sha256OfFile,
  toRaw,
  writeNoise,
  writePattern,
} from "../support/image.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const CLUSTER = 64 * KiB;

describe("writePattern()", () => {
  it("writes data, zero and discarded clusters, and leaves the others alone", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.qcow2"), "qcow2", 8 * CLUSTER);
    await writePattern(path, "qcow2", "AAAA ----");
    await writePattern(path, "qcow2", "B0!- -0--");
    const map = await imageMap(path, "qcow2");
    expect(
      map.map(({ start, length, data, zero }) => [start / CLUSTER, length / CLUSTER, data, zero]),
    ).toEqual([
      [0, 1, true, false],
      [1, 1, false, true],
      [2, 1, false, true],
      [3, 1, true, false],
      [4, 1, false, true],
      [5, 1, false, true],
      [6, 2, false, true],
    ]);
    const expected = directory.file("expected.raw");
    await writeFile(expected, patternBytes(["AAAA ----", "B0!- -0--"]));
    expect(await compareImages(path, { path: expected, format: "raw" })).toBe("identical");
    expect(await sha256OfDisk(path, "qcow2")).toBe(await sha256OfFile(expected));
    expect(await checkImage(path)).toMatchObject(CLEAN);
  });

  it("refuses a character that means nothing", () => {
    expect(() => patternCommands("A?")).toThrow('"?" means nothing');
  });
});

describe("compareImages()", () => {
  it("tells different bytes, different sizes, and with strict different allocation", async () => {
    await using directory = await temporaryDirectory();
    const a = await createImage(directory.file("a.qcow2"), "qcow2", 4 * CLUSTER);
    const same = await createImage(directory.file("b.qcow2"), "qcow2", 4 * CLUSTER);
    const longer = await createImage(directory.file("c.qcow2"), "qcow2", 5 * CLUSTER);
    await writePattern(a, "qcow2", "A0");
    await writePattern(same, "qcow2", "A-");
    await writePattern(longer, "qcow2", "A-");
    expect(await compareImages(a, same)).toBe("identical");
    expect(await compareImages(a, longer)).toContain("size mismatch");
    expect(await compareImages(a, longer, { strict: true })).toContain("size mismatch");
    await writePattern(same, "qcow2", "-B");
    expect(await compareImages(a, same)).toContain(`mismatch at offset ${CLUSTER}`);
    await writePattern(same, "qcow2", "--0-");
    await writePattern(a, "qcow2", "-B--");
    expect(await compareImages(a, same, { strict: true })).toContain("block status mismatch");
  });

  it("throws for an image that is not there", async () => {
    await expect(compareImages("/nonexistent/a", "/nonexistent/b")).rejects.toThrow("code 2");
  });
});

describe("checkImage()", () => {
  it("counts leaks and corruptions", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.qcow2"), "qcow2", 4 * CLUSTER);
    await writePattern(path, "qcow2", "A");
    const { offset } = (await imageMap(path, "qcow2"))[0]!;
    // The L2 table is the cluster before the data: an entry that points to nothing leaks the data.
    await qemuIo(path, "raw", [`write -z ${offset! - CLUSTER} 8`]);
    expect(await checkImage(path)).toMatchObject({ leaks: 1, corruptions: 0, errors: 0 });
    await qemuIo(path, "raw", ["write -P 255 0 4"]);
    expect((await checkImage(path)).errors).toBe(1);
  });
});

describe("toRaw(), imageInfo(), sha256OfDisk()", () => {
  it("follow the chain of backing files", async () => {
    await using directory = await temporaryDirectory();
    const base = await createImage(directory.file("base.qcow2"), "qcow2", 4 * CLUSTER);
    await writePattern(base, "qcow2", "AAAA");
    const top = await createImage(directory.file("top.qcow2"), "qcow2", 4 * CLUSTER, {
      backing: { path: "base.qcow2", format: "qcow2" },
      create: { compression_type: "zstd", cluster_size: "64k" },
    });
    await writePattern(top, "qcow2", "-B0-");
    expect(await imageInfo(top)).toMatchObject({
      format: "qcow2",
      "backing-filename": "base.qcow2",
      "full-backing-filename": base,
      "format-specific": { data: { "compression-type": "zstd" } },
    });
    const raw = await toRaw(top, "qcow2", directory.file("top.raw"));
    await writeFile(directory.file("expected"), patternBytes("AB0A"));
    expect(await sha256OfFile(raw)).toBe(await sha256OfFile(directory.file("expected")));
    expect(await sha256OfDisk(top, "qcow2")).toBe(await sha256OfFile(directory.file("expected")));
  });
});

describe("writeNoise()", () => {
  it("writes the same incompressible bytes for the same seed, others for another", async () => {
    await using directory = await temporaryDirectory();
    const [a, b, c] = ["a", "b", "c"].map((name) => directory.file(name)) as [string, string, string];
    await writeNoise(a, 100_001, 1);
    await writeNoise(b, 100_001, 1);
    await writeNoise(c, 100_001, 2);
    expect(await sha256OfFile(a)).toBe(await sha256OfFile(b));
    expect(await sha256OfFile(a)).not.toBe(await sha256OfFile(c));
    const { stdout } = await run("sh", ["-c", `gzip -c ${a} | wc -c`]);
    expect(Number(stdout)).toBeGreaterThan(100_001);
  });
});

describe("run()", () => {
  it("fails for a tool that is missing, naming the package to install", async () => {
    const env = { PATH: "/nonexistent" };
    await expect(run("qemu-img", ["--version"], { env })).rejects.toThrow("apt-get install qemu-utils");
  });

  it("fails with the command line, the code and what was printed", async () => {
    await expect(run("sh", ["-c", "echo because >&2; exit 3"])).rejects.toThrow(/`sh -c .*code 3\nbecause/s);
    expect(await run("sh", ["-c", "cat; exit 3"], { codes: [3], input: "x" })).toEqual({
      ...{ code: 3, stdout: "x", stderr: "" },
    });
  });

  it("kills what does not end by its deadline", async () => {
    await expect(run("cat", ["/dev/zero"], { deadline: 200 })).rejects.toThrow("SIGKILL");
  });
});
