import { readdir } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { compareImages, createImage, imageInfo, qemuIo, toRaw } from "../support/image.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";

const MiB = 1024 * 1024;

/** Backs images up with no machine, which must succeed. */
async function backupImages(rig: Rig, images: readonly string[], ...more: string[]): Promise<PointView> {
  const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json"];
  const result = await rig.tidemark([...args, ...images.flatMap((image) => ["--image", image]), ...more]);
  return pointOf(result.events());
}

/** Compares a disk of a point with an image, as restored and as bare qemu-img reads it. */
async function verdict(rig: Rig, point: PointView, disk: string, image: string): Promise<string[]> {
  const directory = await rig.restore(point);
  const file = point.disks.find(({ name }) => name === disk)?.image ?? "";
  const bare = { path: `${rig.repository}/vm/${point.id}/${file}`, format: "qcow2" } as const;
  const reference = { path: image, format: "raw" } as const;
  return [
    await compareImages({ path: `${directory}/${disk}.raw`, format: "raw" }, reference),
    await compareImages(bare, reference),
  ];
}

const DAY = 86_400_000;
/** A clock that is set back later. */
const A_DAY_AHEAD = `const now = Date.now.bind(Date);
globalThis.Date = class extends Date {
  constructor(...fields) { if (fields.length === 0) super(now() + ${DAY}); else super(...fields); }
  static now() { return now() + ${DAY}; }
};`;

/** The date that an id begins with. */
function dateOf(id: string): string {
  return `${id.slice(0, 4)}-${id.slice(4, 6)}-${id.slice(6, 8)}T${id.slice(9, 11)}:00:00Z`;
}

const SAME = ["identical", "identical"];

describe("backup of a machine that is off", () => {
  it("forms one chain with backups of the running machine", async () => {
    await using rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 24 * MiB);
    const b = await rig.image("b.raw", "raw", 20 * MiB);
    const disks = [
      { path: a, format: "qcow2", id: "root" },
      { path: b, format: "raw", id: "data" },
    ] as const;
    await rig.start(disks, { guest: "counter" });
    await rig.machine.waitForGuestWriting(8);
    const first = await rig.backup();
    await rig.machine.waitForGuestWriting(8);
    const second = await rig.backup();
    await rig.machine.waitForGuestWriting(8);
    await rig.machine.quit();

    const held = await toRaw(a, "qcow2", rig.directory.file("held-1.raw"));
    const third = await backupImages(rig, [`root=${a}`, `data=${b}`]);
    expect(third).toMatchObject({ state: "shut off", consistency: "offline", parent: second.id });
    expect(third.disks).toMatchObject([
      { name: "root", kind: "incremental", parent: second.id },
      { name: "data", kind: "incremental", parent: second.id },
    ]);
    expect(third.disks[1]?.reason).toMatch(/^compared: .*raw/);
    expect(await verdict(rig, third, "root", held)).toEqual(SAME);
    expect(await verdict(rig, third, "data", b)).toEqual(SAME);

    // Changed by other means while off: the bitmap in the image records that, too.
    await qemuIo(a, "qcow2", ["write -P 7 20M 100k", "discard 21M 1M"]);
    const heldAgain = await toRaw(a, "qcow2", rig.directory.file("held-2.raw"));
    const fourth = await backupImages(rig, [a], "--name", "by file");
    expect(fourth.disks).toMatchObject([{ name: "root", kind: "incremental", parent: third.id }]);
    expect(fourth.disks[0]?.dataClusters).toBeLessThan(8);
    expect(await verdict(rig, fourth, "root", heldAgain)).toEqual(SAME);

    await rig.start(disks, { guest: "counter" });
    await rig.machine.waitForGuestWriting(8);
    const fifth = await rig.backup();
    expect(fifth.disks.map(({ kind, parent }) => [kind, parent])).toEqual([
      ["incremental", fourth.id],
      ["incremental", third.id],
    ]);
    expect(await rig.verify(fifth, { root: a, data: b })).toEqual({ root: "identical", data: "identical" });
    expect(await rig.verify(first, { root: a, data: b })).toEqual({ root: "identical", data: "identical" });
    expect((await readdir(rig.directory.path)).filter((name) => name.startsWith("tm-"))).toEqual([]);
  });

  it("gives a point a later id than its parent's when the clock was set back", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.qcow2", "qcow2", 2 * MiB);
    const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", image];
    const tomorrow = { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(A_DAY_AHEAD)}` };
    const first = pointOf((await rig.tidemark(args, { env: tomorrow })).events());
    expect(Date.parse(dateOf(first.id))).toBeGreaterThan(Date.now() + DAY / 2);
    await qemuIo(image, "qcow2", ["write -P 7 0 100k"]);
    const held = await toRaw(image, "qcow2", rig.directory.file("held.raw"));
    const second = await backupImages(rig, [image]);
    expect(second.disks).toMatchObject([{ kind: "incremental", parent: first.id }]);
    expect(second.id > first.id, `${second.id} after ${first.id}`).toBe(true);
    const points = (
      await rig.tidemark(["list", "vm", "--repo", rig.repository, "--json"])
    ).json() as PointView[];
    expect(points.find(({ current }) => current)?.id).toBe(second.id);
    expect(await verdict(rig, second, "a", held)).toEqual(SAME);
  });

  it("refuses images in use, absent, given twice, or of one name", async () => {
    await using rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 2 * MiB);
    const b = await rig.image("b.raw", "raw", 2 * MiB);
    await rig.start(
      [
        { path: a, format: "qcow2" },
        { path: b, format: "raw" },
      ],
      { guest: "none" },
    );
    const attempt = (...images: string[]) =>
      rig.run([
        ...["backup", "--machine", "vm", "--repo", rig.repository],
        ...images.flatMap((image) => ["--image", image]),
      ]);
    for (const image of [a, b]) {
      const busy = await attempt(image);
      expect(busy.stderr).toContain(`${image}: another process uses it`);
      expect(busy.code).toBe(5);
    }
    await rig.machine.quit();
    expect((await attempt(rig.directory.file("none.qcow2"))).code).toBe(4);
    expect((await attempt(a, a)).code).toBe(2);
    expect((await attempt(`x=${a}`, `x=${b}`)).code).toBe(2);
    expect((await attempt(`../x=${a}`)).code).not.toBe(0);
    expect((await rig.run(["backup", "--machine", "vm", "--repo", rig.repository])).code).toBe(2);
    const missing = await rig.run(["backup", "--machine", "vm", "--repo", rig.repository, "--image", a], {
      env: { TIDEMARK_QSD: "/nonexistent/qsd" },
    });
    expect(missing.code).toBe(4);
    expect(missing.stderr).toContain("TIDEMARK_QSD");
    expect((await imageInfo(a))["format-specific"]?.data.bitmaps ?? []).toEqual([]);
    expect(await readdir(rig.repository)).toEqual(["tidemark.json"]);
  });

  it("follows an overlay down to its backing file", async () => {
    await using rig = await Rig.create();
    const base = await rig.image("base.raw", "raw", 4 * MiB);
    await qemuIo(base, "raw", ["write -P 1 0 4M"]);
    const image = await createImage(rig.directory.file("over.qcow2"), "qcow2", 5 * MiB, {
      backing: { path: base, format: "raw" },
    });
    await qemuIo(image, "qcow2", ["write -P 2 1M 64k", "write -z 2M 64k"]);
    const held = await toRaw(image, "qcow2", rig.directory.file("held.raw"));
    const point = await backupImages(rig, [`d=${image}`]);
    expect(await verdict(rig, point, "d", held)).toEqual(SAME);
  });

  it("leaves images that go on, when it is killed in the middle", async () => {
    await using rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 64 * MiB);
    await qemuIo(a, "qcow2", ["write -P 1 0 64M"]);
    const first = await backupImages(rig, [`d=${a}`]);
    await qemuIo(a, "qcow2", ["write -P 2 0 40M"]);
    const held = await toRaw(a, "qcow2", rig.directory.file("held.raw"));
    await using agent = startTidemark(
      [
        ...["backup", "--machine", "vm", "--repo", rig.repository, "--json"],
        "--image",
        `d=${a}`,
        "--bandwidth",
        "4MiB",
      ],
      { env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") } },
    );
    await agent.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    agent.kill("SIGKILL");
    await agent.ended;
    // The daemon ends by itself, in order; until then the image is in use.
    let second: PointView | undefined;
    while (second === undefined) {
      const result = await rig.run([
        "backup",
        "--machine",
        "vm",
        "--repo",
        rig.repository,
        "--json",
        "--image",
        `d=${a}`,
      ]);
      if (result.code === 5) continue;
      second = pointOf(result.events());
    }
    expect(second.disks).toMatchObject([{ kind: "incremental", parent: first.id }]);
    expect(await verdict(rig, second, "d", held)).toEqual(SAME);
    expect((await readdir(rig.directory.path)).filter((name) => name.startsWith("tm-"))).toEqual([]);
  });
});
