import { readFile, readdir, stat, writeFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { checkImage, CLEAN, compareImages, imageInfo } from "../support/image.js";
import { Rig, type PointView } from "../support/rig.js";

const KiB = 1024;
const MiB = 1024 * KiB;

/** A machine with one disk of 5 MiB + 512 bytes and two points of it. */
async function twoPoints(rig: Rig): Promise<{ image: string; first: PointView; second: PointView }> {
  const image = await rig.image("disk.qcow2", "qcow2", 5 * MiB + 512);
  await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
  await rig.machine.qemuIoAll("vda", ["write -P 0x11 0 1M", "write -P 0x22 3M 300k", "write -P 0x33 5M 512"]);
  const first = await rig.backup(["--name", "one"]);
  await rig.machine.qemuIoAll("vda", ["write -P 0x44 64k 64k", "write -z -u 3M 128k", "discard 512k 256k"]);
  const second = await rig.backup(["--description", "the second"]);
  return { image, first, second };
}

describe("restore", () => {
  it("gives the point's bytes as raw, as qcow2, as a range, by name, by time and on standard output", async () => {
    await using rig = await Rig.create();
    const { image, first, second } = await twoPoints(rig);
    const repo = ["--repo", rig.repository];
    const bytes = await readFile(rig.reference(first, image));
    const newer = await readFile(rig.reference(second, image));
    expect(bytes.equals(newer)).toBe(false);
    expect(await rig.verify(first, { vda: image })).toEqual({ vda: "identical" });
    expect(await rig.verify(second, { vda: image })).toEqual({ vda: "identical" });

    const piped = await rig.tidemark(["restore", "vm@one", ...repo, "--to", "-"]);
    expect(piped.stdoutBytes.equals(bytes)).toBe(true);

    const qcow2 = rig.directory.file("restored.qcow2");
    await rig.tidemark(["restore", "vm", ...repo, "--disk", "vda", "--to", qcow2, "--format", "qcow2"]);
    expect(await checkImage(qcow2)).toMatchObject(CLEAN);
    expect(
      await compareImages(
        { path: qcow2, format: "qcow2" },
        { path: rig.reference(second, image), format: "raw" },
      ),
    ).toBe("identical");
    const info = await imageInfo(qcow2);
    expect(info["backing-filename"]).toBeUndefined();
    expect(info["actual-size"]).toBeLessThan(3 * MiB);

    const range = rig.directory.file("range.raw");
    await rig.tidemark(["restore", "vm@latest~1", ...repo, "--to", range, "--range", "100000:1000001"]);
    expect((await readFile(range)).equals(bytes.subarray(100_000, 1_100_001))).toBe(true);

    const at = rig.directory.file("at.raw");
    const list = (await rig.tidemark(["list", ...repo, "--json"])).json() as { created: string }[];
    await rig.tidemark(["restore", "vm", ...repo, "--at", list[0]?.created ?? "", "--to", at]);
    expect((await readFile(at)).equals(bytes)).toBe(true);
  });

  it("never overwrites without --force, and never a disk in use", async () => {
    await using rig = await Rig.create();
    const { image, second } = await twoPoints(rig);
    const restore = ["restore", "vm", "--repo", rig.repository, "--to"];
    const target = rig.directory.file("target.raw");
    await writeFile(target, "precious");

    const refused = await rig.run([...restore, target]);
    expect(refused.code).toBe(2);
    expect(refused.stderr).toContain("--force");
    expect(await readFile(target, "utf8")).toBe("precious");

    await rig.tidemark([...restore, target, "--force"]);
    expect((await readFile(target)).equals(await readFile(rig.reference(second, image)))).toBe(true);

    const inUse = await rig.run([...restore, image, "--force"]);
    expect(inUse.code).toBe(5);
    expect(inUse.stderr).toContain("locked");
  });

  it("refuses what cannot be, with a hint, and changes nothing", async () => {
    await using rig = await Rig.create();
    await twoPoints(rig);
    const target = rig.directory.file("t.raw");
    const restore = (reference: string, ...more: string[]) =>
      rig.run(["restore", reference, "--repo", rig.repository, "--to", target, ...more]);
    const cases: [number, Promise<{ code: number | null; stderr: string }>][] = [
      [4, restore("nobody")],
      [4, restore("vm@20200101T000000000Z-000000")],
      [4, restore("vm@latest~9")],
      [2, restore("../../etc")],
      [4, restore("vm", "--disk", "vdz")],
      [2, restore("vm", "--range", "5M:1M")],
      [2, restore("vm", "--range", "1M")],
      [2, restore("vm", "--format", "vmdk")],
      [2, restore("vm", "--at", "yesterday")],
      [4, restore("vm", "--at", "2020-01-01T00:00:00Z")],
      [
        2,
        rig.run(["restore", "vm", "--repo", rig.repository, "--to", rig.directory.file("no/such/dir.raw")]),
      ],
      [2, rig.run(["restore", "vm", "--repo", rig.repository])],
      [4, rig.run(["restore", "vm", "--repo", rig.directory.file("nowhere"), "--to", target])],
    ];
    for (const [code, running] of cases) {
      const result = await running;
      expect(result.stderr).toMatch(/^tidemark: /);
      expect({ code: result.code, stderr: result.stderr }).toMatchObject({ code });
    }
    expect((await readdir(rig.directory.path)).filter((name) => name.includes("t.raw"))).toEqual([]);
  });

  it("is interrupted with exit 130 and no trace, and leaves no target", async () => {
    await using rig = await Rig.create();
    await twoPoints(rig);
    const args = ["restore", "vm", "--repo", rig.repository, "--to", rig.directory.file("t.raw")];
    await using agent = startTidemark([...args, "--bandwidth", "200KiB", "--json"]);
    await agent.nextEvent(({ event }) => event === "progress");
    agent.kill("SIGINT");
    const { code, stdout, stderr } = await agent.ended;
    expect(stdout + stderr).not.toContain("AbortError");
    expect(code).toBe(130);
    expect((await readdir(rig.directory.path)).filter((name) => name.includes("t.raw"))).toEqual([]);
  });

  it("ends with exit 6 on a damaged image, naming it and its points, and leaves no target", async () => {
    await using rig = await Rig.create();
    const { first, second } = await twoPoints(rig);
    const key = `vm/${first.id}/vda.qcow2`;
    const path = `${rig.repository}/${key}`;
    const bytes = await readFile(path);
    bytes[64 * KiB + 9] = (bytes[64 * KiB + 9] ?? 0) ^ 0x55; // in the first frame
    await writeFile(path, bytes);
    const target = rig.directory.file("t.raw");
    const result = await rig.run(["restore", "vm", "--repo", rig.repository, "--to", target]);
    expect(result.code).toBe(6);
    expect(result.stderr).toContain(key);
    expect(result.stderr).toContain(first.id);
    expect(result.stderr).toContain(second.id);
    await expect(stat(target)).rejects.toThrow("ENOENT");
    expect((await readdir(rig.directory.path)).filter((name) => name.includes("partial"))).toEqual([]);
  });
});
