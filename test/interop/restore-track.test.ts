import { mkdir, readdir, readFile, rm, stat } from "node:fs/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { checkImage, CLEAN, compareImages, createImage, imageInfo, qemuIo, toRaw } from "../support/image.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";
import { run } from "../support/tools.js";

const MiB = 1024 * 1024;

let rig: Rig;
let image: string;
/** Points A, B, D of a machine with one disk, in this order, and what each held. */
let points: PointView[];
const held = (point: PointView): string => rig.directory.file(`held-${point.id}.raw`);

beforeEach(async () => {
  rig = await Rig.create();
  image = await rig.image("a.qcow2", "qcow2", 16 * MiB);
  points = [];
  for (const number of [1, 2, 3]) {
    const length = number === 1 ? "9M" : "2M";
    await qemuIo(image, "qcow2", [`write -P ${number} ${number}M ${length}`, `discard ${number - 1}M 128k`]);
    await backUp(image, "--keep-checkpoints", "3");
  }
}, 120_000);

afterEach(async () => {
  await rig[Symbol.asyncDispose]();
});

/** Backs an image up without a machine, and keeps what it held. */
async function backUp(file: string, ...more: string[]): Promise<PointView> {
  const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `vda=${file}`];
  const point = pointOf((await rig.tidemark([...args, ...more])).events());
  points.push(point);
  await toRaw(file, "qcow2", held(point));
  return point;
}

/** Every point so far: as restored, and as bare qemu-img reads the repository. */
async function expectAllRight(): Promise<void> {
  for (const point of points) {
    const reference = { path: held(point), format: "raw" } as const;
    const bare = { path: `${rig.repository}/vm/${point.id}/vda.qcow2`, format: "qcow2" } as const;
    expect(await compareImages(bare, reference)).toBe("identical");
    const restored = { path: `${await rig.restore(point)}/vda.raw`, format: "raw" } as const;
    expect(await compareImages(restored, reference)).toBe("identical");
  }
}

const restoreArguments = (point: PointView, ...args: string[]): string[] => [
  ...["restore", `vm@${point.id}`, "--repo", rig.repository, "--json", "--track", ...args],
];

async function bitmapsOf(file: string): Promise<{ name: string; flags: string[]; granularity: number }[]> {
  const bitmaps = (await imageInfo(file))["format-specific"]?.data.bitmaps ?? [];
  return bitmaps.map(({ name, flags, granularity }) => ({ name, flags: [...flags], granularity }));
}

/** The bitmap that a point's checkpoint has. */
async function bitmapNameOf(point: PointView): Promise<string> {
  const list = (await rig.tidemark(["list", "vm", "--repo", rig.repository, "--json"])).json() as {
    id: string;
    disks: { bitmap: string }[];
  }[];
  return list.find(({ id }) => id === point.id)?.disks[0]?.bitmap ?? "";
}

async function expectHolds(file: string, point: PointView): Promise<void> {
  const { report, ...clean } = await checkImage(file);
  expect(clean, report).toEqual(CLEAN);
  const reference = { path: held(point), format: "raw" } as const;
  expect(await compareImages({ path: file, format: "qcow2" }, reference)).toBe("identical");
}

describe("restore --track", () => {
  it("makes a branch: both machines go on incrementally, each from its own point", async () => {
    const [, b, d] = points;
    const branch = rig.directory.file("branch");
    await rig.tidemark(restoreArguments(b!, "--to-dir", branch));
    const file = `${branch}/vda.qcow2`;
    await expectHolds(file, b!);
    expect(await bitmapsOf(file)).toEqual([
      { name: await bitmapNameOf(b!), flags: ["auto"], granularity: 65536 },
    ]);

    const start = (path: string): Promise<unknown> =>
      rig.start([{ path, format: "qcow2", id: "vda" }], { guest: "none" });
    const backUpLive = async (path: string, pattern: number, parent: PointView): Promise<PointView> => {
      await rig.machine.qemuIoAll(0, [`write -P ${pattern} 9M 100k`, `discard ${pattern}M 64k`]);
      const point = await rig.backup();
      expect(point.disks).toMatchObject([{ kind: "incremental", parent: parent.id, reason: null }]);
      expect(point.parent).toBe(parent.id);
      expect(point.disks[0]?.dataClusters).toBeLessThan(4);
      expect(await rig.verify(point, { vda: path })).toEqual({ vda: "identical" });
      return point;
    };
    await start(file);
    const args = ["status", "--qmp", rig.proxy.socket, "--machine", "vm", "--repo", rig.repository, "--json"];
    const { disks } = (await rig.tidemark(args)).json() as { disks: { next: object }[] };
    expect(disks[0]?.next).toEqual({ kind: "incremental", reason: null, parent: b!.id });
    const e = await backUpLive(file, 4, b!);
    const e2 = await backUpLive(file, 5, e);
    await rig.machine.quit();

    await start(image);
    const f = await backUpLive(image, 6, d!);
    await rig.machine.quit();
    // Whoever backed up last has the newest point; the other one goes on from its own all the same.
    const list = (
      await rig.tidemark(["list", "vm", "--repo", rig.repository, "--json"])
    ).json() as PointView[];
    expect(list.find(({ current }) => current)?.id).toBe(f.id);
    await start(file);
    const g = await backUpLive(file, 7, e2);
    await rig.machine.quit();
    const before = await rig.tidemark(["show", "vm@latest~2", "--repo", rig.repository, "--json"]);
    expect((before.json() as PointView).id).toBe(e.id);
    // A full one belongs to its branch, too.
    expect((await backUp(image, "--full")).parent).toBe(f.id);
    expect((await backUp(file)).disks).toMatchObject([{ kind: "incremental", parent: g.id }]);
    await expectAllRight();
  });

  it("in place: takes the repository's other checkpoints away, and nobody else's", async () => {
    const [, b] = points;
    const others = ["libvirt-cp", "tidemark-ffffffff-20200101T000000000Z-abcdef-11111111"];
    for (const name of others) await run("qemu-img", ["bitmap", "-f", "qcow2", "--add", image, name]);
    expect(await bitmapsOf(image)).toHaveLength(5);
    const args = ["--disk", "vda", "--to", image, "--format", "qcow2", "--force"];
    const done = (await rig.tidemark(restoreArguments(b!, ...args, "--only-changed"))).events().at(-1);
    expect(done).toMatchObject({ event: "result", disks: [{ bytes: 16 * MiB }] });
    await expectHolds(image, b!);
    expect((await bitmapsOf(image)).map(({ name }) => name).sort()).toEqual(
      [...others, await bitmapNameOf(b!)].sort(),
    );
    await qemuIo(image, "qcow2", ["write -P 9 12M 10k"]);
    const next = await backUp(image);
    expect(next.disks).toMatchObject([{ kind: "incremental", parent: b!.id, reason: null, dataClusters: 1 }]);

    // Made anew: nothing of the old file is left. Clusters of 2 MiB: the bitmap goes by them.
    await rig.tidemark(restoreArguments(b!, ...args));
    expect((await bitmapsOf(image)).map(({ name }) => name)).toEqual([await bitmapNameOf(b!)]);
    await rm(image);
    await run("qemu-img", ["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, String(16 * MiB)]);
    await rig.tidemark(restoreArguments(b!, ...args, "--only-changed"));
    await expectHolds(image, b!);
    expect(await bitmapsOf(image)).toEqual([
      { name: await bitmapNameOf(b!), flags: ["auto"], granularity: 2 * MiB },
    ]);
    await qemuIo(image, "qcow2", ["write -P 8 12M 10k"]);
    const last = await backUp(image);
    expect(last.disks).toMatchObject([{ kind: "incremental", parent: b!.id, reason: null }]);
    await expectAllRight();
  });

  it("killed in the middle leaves no checkpoint that claims what is not there", async () => {
    const [a] = points;
    const args = ["--disk", "vda", "--format", "qcow2", "--bandwidth", "1MiB/s"];
    const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") };
    const kill = async (...more: string[]): Promise<void> => {
      await using running = startTidemark(restoreArguments(a!, ...args, ...more), { env });
      await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > MiB);
      running.kill("SIGKILL");
      expect((await running.ended).signal).toBe("SIGKILL");
    };
    const fresh = rig.directory.file("fresh.qcow2");
    await kill("--to", fresh);
    await expect(stat(fresh)).rejects.toMatchObject({ code: "ENOENT" });

    await qemuIo(image, "qcow2", ["write -P 0xee 0 16M"]);
    await kill("--to", image, "--force", "--only-changed");
    // The daemon of the one that was killed still ends; then the image holds a mixture, and says nothing about it.
    const deadline = performance.now() + 20_000;
    while ((await run("qemu-img", ["info", image]).catch(() => undefined)) === undefined) {
      if (performance.now() > deadline) throw new Error("The image stays in use");
    }
    expect(await bitmapsOf(image)).toEqual([]);
    const next = await backUp(image);
    expect(next.disks).toMatchObject([
      { kind: "incremental", reason: expect.stringContaining("compared") as string },
    ]);

    await rig.tidemark(restoreArguments(a!, "--disk", "vda", "--to", image, "--force", "--only-changed"));
    await expectHolds(image, a!);
    await qemuIo(image, "qcow2", ["write -P 7 3M 10k"]);
    expect((await backUp(image)).disks).toMatchObject([{ parent: a!.id, reason: null, dataClusters: 1 }]);
    await expectAllRight();
  });

  it("refuses what has no room for a checkpoint, before anything is written", async () => {
    const [a] = points;
    const folder = rig.directory.file("targets");
    await mkdir(folder);
    const old = await createImage(`${folder}/old.qcow2`, "qcow2", 16 * MiB);
    await run("qemu-img", ["amend", "-f", "qcow2", "-o", "compat=0.10", old]);
    const overlay = `${folder}/overlay.qcow2`;
    await run("qemu-img", ["create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay]);
    const files = (await readdir(folder)).sort();
    const force = ["--force", "--only-changed"];
    const cases: readonly (readonly [args: readonly string[], code: number, says: string])[] = [
      [["--to", `${folder}/x.raw`], 2, "only whole qcow2 files"],
      [["--to-dir", folder, "--format", "raw"], 2, "only whole qcow2 files"],
      [["--to", `nbd+unix:///x?socket=${folder}/none`], 2, "only whole qcow2 files"],
      [["--to", `${folder}/x.qcow2`, "--range", "0:64K"], 2, "--range"],
      [["--to", old, ...force], 2, "version 2"],
      [["--to", overlay, ...force], 2, "backing image"],
    ];
    for (const [args, code, says] of cases) {
      const result = await rig.run(restoreArguments(a!, ...args));
      expect([args, result.code]).toEqual([args, code]);
      expect(result.stdout + result.stderr).toContain(says);
    }
    const without = await rig.run(restoreArguments(a!, "--to", `${folder}/x.qcow2`), {
      env: { TIDEMARK_QSD: "/nonexistent/qsd" },
    });
    expect(without.code).toBe(4);
    expect((await readdir(folder)).sort()).toEqual(files);

    // Of several disks all are looked at before the first one is touched.
    const other = await createImage(rig.directory.file("vdb.qcow2"), "qcow2", MiB);
    await backUp(image, "--image", `vdb=${other}`);
    const both = rig.directory.file("both");
    await mkdir(both);
    await qemuIo(await createImage(`${both}/vda.qcow2`, "qcow2", MiB), "qcow2", ["write -P 9 0 1M"]);
    await createImage(`${both}/vdb.qcow2`, "qcow2", MiB);
    await run("qemu-img", ["amend", "-f", "qcow2", "-o", "compat=0.10", `${both}/vdb.qcow2`]);
    const untouched = await readFile(`${both}/vda.qcow2`);
    const result = await rig.run(restoreArguments(points.at(-1)!, "--to-dir", both, ...force));
    expect([result.code, result.stdout]).toEqual([2, expect.stringContaining("version 2")]);
    expect((await readFile(`${both}/vda.qcow2`)).equals(untouched)).toBe(true);
    for (const file of [old, overlay]) expect(await bitmapsOf(file)).toEqual([]);
    expect(await bitmapsOf(image)).toHaveLength(1);
  });
});
