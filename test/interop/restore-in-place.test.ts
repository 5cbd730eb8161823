import {
  chmod,
  chown,
  copyFile,
  readdir,
  readFile,
  stat,
  symlink,
  truncate,
  writeFile,
} from "node:fs/promises";
import { dirname } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { checkImage, CLEAN, compareImages, imageInfo, qemuIo, toRaw } from "../support/image.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";
import { run } from "../support/tools.js";

const MiB = 1024 * 1024;
const SIZE = 16 * MiB;

let rig: Rig;
/** The machine's own image. */
let image: string;

beforeEach(async () => {
  rig = await Rig.create();
  image = await rig.image("disk.qcow2", "qcow2", SIZE);
});
afterEach(async () => {
  await rig[Symbol.asyncDispose]();
});

const held = (point: PointView): string => rig.directory.file(`held-${point.id}.raw`);

/** Backs the image up without a machine, and keeps what it holds as qemu-img reads it. */
async function backUp(): Promise<PointView> {
  const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `vda=${image}`];
  const point = pointOf((await rig.tidemark(args)).events());
  await toRaw(image, "qcow2", held(point));
  return point;
}

/** Restores a point onto the image. */
async function restoreOnto(point: PointView, ...more: string[]) {
  const args = ["restore", `vm@${point.id}`, "--repo", rig.repository, "--json", "--force", "--to", image];
  const result = await rig.run([...args, ...more]);
  const last = result.events().at(-1) as { message?: string; disks?: { writtenBytes: number }[] };
  return { code: result.code, message: last.message ?? "", written: last.disks?.[0]?.writtenBytes };
}

/** The image holds just what it held at a point, and is sound. */
async function expectHolds(point: PointView): Promise<void> {
  expect(await checkImage(image)).toMatchObject(CLEAN);
  const reference = { path: held(point), format: "raw" } as const;
  expect(await compareImages({ path: image, format: "qcow2" }, reference)).toBe("identical");
  expect((await imageInfo(image))["virtual-size"]).toBe((await stat(held(point))).size);
}

/** A point restores to what the image held, and bare qemu-img reads the same. */
async function expectRight(point: PointView): Promise<void> {
  const reference = { path: held(point), format: "raw" } as const;
  const restored = { path: `${await rig.restore(point)}/vda.raw`, format: "raw" } as const;
  expect(await compareImages(restored, reference)).toBe("identical");
  const bare = { path: `${rig.repository}/vm/${point.id}/vda.qcow2`, format: "qcow2" } as const;
  expect(await compareImages(bare, reference)).toBe("identical");
}

const bitmapsOf = async () => (await imageInfo(image))["format-specific"]?.data.bitmaps ?? [];

/** Two points: 4 MiB of data; then a part of it changed, a part discarded, and something new. */
async function twoPoints(): Promise<readonly [PointView, PointView]> {
  await qemuIo(image, "qcow2", ["write -P 1 0 4M", "write -P 2 10M 128k"]);
  const first = await backUp();
  await qemuIo(image, "qcow2", ["write -P 3 1M 64k", "discard 2M 1M", "write -P 4 12M 1M"]);
  return [first, await backUp()];
}

describe("restore of an older point onto the machine's own image", () => {
  it.each([
    { how: "--only-changed", kinds: ["incremental"] },
    // A new image has no checkpoint: compared with the newest point, stored as an increment of it.
    { how: "as a new image", kinds: ["incremental"] },
  ])("lets backups go on rightly, off and live: $how", async ({ how, kinds }) => {
    const [first] = await twoPoints();
    const more = how === "--only-changed" ? [how] : [];
    expect(await restoreOnto(first, ...more)).toMatchObject({ code: 0 });
    await expectHolds(first);
    expect(await bitmapsOf()).toHaveLength(more.length);
    await qemuIo(image, "qcow2", ["write -P 5 3M 64k"]);
    const off = await backUp();
    expect(off.disks.map(({ kind }) => kind)).toEqual(kinds);
    await expectRight(off);

    expect(await restoreOnto(first, ...more)).toMatchObject({ code: 0 });
    await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
    await rig.machine.qemuIoAll("vda", ["write -P 6 64k 64k", "discard 10M 64k"]);
    const live = await rig.backup();
    expect(live.disks.map(({ kind }) => kind)).toEqual(kinds);
    expect(await rig.verify(live, { vda: image })).toEqual({ vda: "identical" });
    await rig.machine.qemuIoAll("vda", ["write -P 7 5M 64k"]);
    const next = await rig.backup();
    expect(next.disks[0]?.kind).toBe("incremental");
    expect(await rig.verify(next, { vda: image })).toEqual({ vda: "identical" });
    await rig.machine.quit();
    await expectRight(first);
  });

  it("gives the image the disk's size at the point, smaller and larger", async () => {
    await qemuIo(image, "qcow2", ["write -P 1 0 16M"]);
    const small = await backUp();
    await run("qemu-img", ["resize", "-q", "-f", "qcow2", image, `${SIZE + 8 * MiB + 512}`]);
    await qemuIo(image, "qcow2", [`write -P 2 ${SIZE} 8M`, "write -P 3 0 64k"]);
    const large = await backUp();
    for (const point of [small, large, small]) {
      expect(await restoreOnto(point, "--only-changed")).toMatchObject({ code: 0 });
      await expectHolds(point);
      await qemuIo(image, "qcow2", ["write -P 4 2M 64k"]);
      await expectRight(await backUp());
    }
  });

  it("writes beside internal snapshots, and refuses before any byte what they do not allow", async () => {
    const [first, second] = await twoPoints();
    await run("qemu-img", ["snapshot", "-c", "kept", image]);
    expect(await restoreOnto(first, "--only-changed")).toMatchObject({ code: 0 });
    await expectHolds(first);
    await run("qemu-img", ["resize", "-q", "-f", "qcow2", image, `${SIZE + MiB}`]);
    expect(await restoreOnto(second, "--only-changed")).toMatchObject({ code: 0 });
    await expectHolds(second);
    expect((await run("qemu-img", ["snapshot", "-l", image])).stdout).toContain("kept");

    await run("qemu-img", ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", image, `${SIZE + MiB}`]);
    await run("qemu-img", ["snapshot", "-c", "kept", image]);
    const before = await readFile(image);
    const refused = await restoreOnto(second, "--only-changed");
    expect(refused.code).toBe(1);
    expect(refused.message).toContain(`Cannot resize image ${image} from ${SIZE + MiB} to ${SIZE} bytes`);
    expect((await readFile(image)).equals(before)).toBe(true);
  });

  it("writes an overlay, and nothing of what it lies on", async () => {
    const [first, second] = await twoPoints();
    const base = rig.directory.file("base.raw");
    await writeFile(base, Buffer.alloc(SIZE, 0xee));
    await run("qemu-img", ["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image]);
    for (const point of [second, first]) {
      expect(await restoreOnto(point, "--only-changed")).toMatchObject({ code: 0 });
      await expectHolds(point);
    }
    expect((await readFile(base)).every((byte) => byte === 0xee)).toBe(true);
  });

  it("killed half-way leaves an image whose next backup does not lie, and that a second restore mends", async () => {
    const [first] = await twoPoints();
    for (const mends of [false, true]) {
      await qemuIo(image, "qcow2", [`write -P 9 0 ${SIZE}`]);
      const last = await backUp();
      const args = [
        "restore",
        `vm@${first.id}`,
        "--repo",
        rig.repository,
        "--json",
        "--force",
        "--to",
        image,
      ];
      await using running = startTidemark([...args, "--only-changed", "--bandwidth", "1MiB"]);
      // The second piece, which waits two seconds for its bandwidth: the first one has been written then.
      await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 2 * MiB);
      running.kill("SIGKILL");
      await running.ended;
      // Its storage daemon ends in order, and lets go of the image.
      const isFree = () =>
        run("qemu-img", ["info", image]).then(
          () => true,
          () => false,
        );
      await expect.poll(isFree, { timeout: 20_000 }).toBe(true);
      expect(await checkImage(image)).toMatchObject(CLEAN);
      for (const point of [first, last]) {
        const reference = { path: held(point), format: "raw" } as const;
        expect(await compareImages({ path: image, format: "qcow2" }, reference)).not.toBe("identical");
      }
      if (mends) {
        expect(await restoreOnto(first, "--only-changed")).toMatchObject({ code: 0 });
        await expectHolds(first);
      }
      const next = await backUp();
      expect(next.disks[0]?.kind).toBe("incremental");
      await expectRight(next);
    }
  });

  it("refuses an image that a machine runs on, through a link as well, and one whose format was not said", async () => {
    const [first] = await twoPoints();
    await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
    const before = await readFile(image);
    const link = rig.directory.file("link.qcow2");
    await symlink(image, link);
    for (const to of [image, link]) {
      for (const more of [[], ["--only-changed"]]) {
        const refused = await restoreOnto(first, "--to", to, ...more);
        expect(refused).toMatchObject({ code: 5, message: expect.stringContaining("locked") as string });
      }
    }
    expect((await readFile(image)).equals(before)).toBe(true);
    await rig.machine.quit();
    const odd = rig.directory.file("odd.img");
    await symlink(image, odd);
    const refused = await restoreOnto(first, "--to", odd);
    expect(refused).toMatchObject({
      code: 2,
      message: expect.stringContaining("no format was given") as string,
    });
    expect(await restoreOnto(first, "--to", odd, "--format", "qcow2", "--only-changed")).toMatchObject({
      code: 0,
    });
    await expectHolds(first);
  });

  it("keeps machines from starting on a raw image while it is written, whatever size that had", async () => {
    const [first, last] = await twoPoints();
    const raw = rig.directory.file("machine.raw");
    await copyFile(held(last), raw);
    await truncate(raw, SIZE + MiB);
    const args = ["restore", `vm@${first.id}`, "--repo", rig.repository, "--json", "--to", raw, "--force"];
    await using running = startTidemark([...args, "--only-changed", "--bandwidth", "1MiB"]);
    await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    const start = rig.start([{ path: raw, format: "raw", id: "vda" }], { guest: "none" });
    await expect(start).rejects.toThrow(/Failed to get .* lock/);
    expect((await running.ended).code).toBe(0);
    const restored = { path: raw, format: "raw" } as const;
    expect(await compareImages(restored, { path: held(first), format: "raw" })).toBe("identical");
    expect((await stat(raw)).size).toBe(SIZE);
  });

  it("does not replace an image that a machine was started on meanwhile: it would go on with a file without a name", async () => {
    const [first] = await twoPoints();
    const { ino } = await stat(image);
    const args = ["restore", `vm@${first.id}`, "--repo", rig.repository, "--json", "--to", image, "--force"];
    await using running = startTidemark([...args, "--bandwidth", "1MiB/s"], {
      env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") },
    });
    await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    running.kill("SIGSTOP");
    await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
    await rig.machine.qemuIoAll("vda", ["write -P 9 7M 64k"]);
    running.kill("SIGCONT");
    expect((await running.ended).code).toBe(5);
    await rig.machine.quit();
    expect((await stat(image)).ino).toBe(ino);
    const bytes = await readFile(await toRaw(image, "qcow2", rig.directory.file("now.raw")));
    expect(bytes.subarray(7 * MiB, 7 * MiB + 64 * 1024).every((byte) => byte === 9)).toBe(true);
    expect((await readdir(dirname(image))).filter((name) => name.includes("partial"))).toEqual([]);
  });

  it("refuses every target in the repository, through a link as well", async () => {
    const [first, last] = await twoPoints();
    const stored = `${rig.repository}/vm/${last.id}/vda.qcow2`;
    const link = rig.directory.file("link");
    await symlink(rig.repository, link);
    const before = await readFile(stored);
    for (const to of [stored, `${link}/vm/${last.id}/vda.qcow2`, `${link}/new/vda.qcow2`]) {
      const refused = await restoreOnto(first, "--to", to);
      expect(refused).toMatchObject({
        code: 2,
        message: expect.stringContaining("in the repository") as string,
      });
    }
    const all = ["restore", `vm@${first.id}`, "--repo", rig.repository, "--to-dir", `${rig.repository}/new`];
    expect((await rig.run(all)).code).toBe(2);
    expect((await readFile(stored)).equals(before)).toBe(true);
    expect(await readdir(rig.repository)).not.toContain("new");
    await expectRight(last);
  });

  it("keeps owner and mode of an image that it replaces", async () => {
    const [first] = await twoPoints();
    await chown(image, 12_345, 54_321);
    await chmod(image, 0o640);
    const { ino } = await stat(image);
    expect(await restoreOnto(first)).toMatchObject({ code: 0 });
    const found = await stat(image);
    expect(found.ino).not.toBe(ino);
    expect({ uid: found.uid, gid: found.gid, mode: found.mode & 0o777 }).toEqual({
      ...{ uid: 12_345, gid: 54_321, mode: 0o640 },
    });
    await expectHolds(first);
  });
});
