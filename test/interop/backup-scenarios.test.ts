import { copyFile, readFile, truncate } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { compareImages, createImage, qemuIo } from "../support/image.js";
import type { TestDisk } from "../support/qemu.js";
import type { PointView } from "../support/rig.js";
import { diskOf, qcow2, raw, Story, type Bitmap } from "../support/story.js";
import { run } from "../support/tools.js";

const FIRST = "first backup of this disk";
const RAW_RESTARTED = "compared: checkpoint bitmap missing (raw disk, QEMU restarted)";
const LOST = "compared: checkpoint bitmap missing (disk replaced, or QEMU was killed before it was stored)";
const INCONSISTENT = "compared: bitmap inconsistent: QEMU did not shut down cleanly";

describe("backup of a machine that was restarted", () => {
  it("goes on with qcow2 after a clean end, compares after SIGKILL, and says why", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 4 * MiB);
    const b = await story.rig.image("b.raw", "raw", 3 * MiB + 512);
    const disks = [qcow2(a), raw(b)];
    const images = { vd0: a, vd1: b };
    await story.start(disks);
    await story.write(0, "write -P 1 0 2M");
    await story.write(1, "write -P 2 0 3M");
    expect((await story.backup(images)).kinds).toEqual({ vd0: FIRST, vd1: FIRST });
    await story.write(0, "write -P 3 100k 5k");
    await story.write(1, "write -P 4 100k 5k");

    await story.restart(disks);
    await story.write(0, "write -z 1M 64k");
    await story.write(1, "discard 1M 64k");
    const clean = await story.backup(images);
    expect(clean.kinds).toEqual({ vd0: "incremental", vd1: RAW_RESTARTED });
    // What was written before the end and what was written after it.
    expect(diskOf(clean.point, "vd0")).toMatchObject({
      dirtyBytes: 128 * KiB,
      dataClusters: 1,
      zeroClusters: 1,
    });

    // The bitmap is on disk, marked as in use, when the next machine is killed.
    await story.restart(disks);
    await story.write(0, "write -P 5 3M 1000");
    await story.rig.machine.kill();
    await story.start(disks);
    const killed = await story.backup(images);
    expect(killed.kinds).toEqual({ vd0: INCONSISTENT, vd1: RAW_RESTARTED });
    expect(diskOf(killed.point, "vd0").token).toBe(diskOf(clean.point, "vd0").token);
    await story.write(0, "write -P 6 0 64k");
    expect((await story.backup(images)).kinds).toEqual({ vd0: "incremental", vd1: "incremental" });

    // The newest bitmap was never stored: QEMU's end takes it along.
    await story.write(0, "write -P 7 1M 512");
    await story.rig.machine.kill();
    await story.start(disks);
    const forgotten = await story.backup(images);
    expect(forgotten.kinds).toEqual({ vd0: LOST, vd1: RAW_RESTARTED });
    expect((await story.bitmaps(a)).map(({ name }) => name)).toEqual([
      expect.stringContaining(forgotten.point.id),
    ]);
    await story.proveAll();
  });
});

describe("backup of disks that change size", () => {
  it("stays incremental when disks grow and shrink online, partly filled clusters included", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 2 * MiB + 512);
    const b = await story.rig.image("b.raw", "raw", 2 * MiB + 512);
    const c = await createImage(story.rig.directory.file("c.qcow2"), "qcow2", 4 * MiB, {
      create: { cluster_size: "4k" },
    });
    const images = { vd0: a, vd1: b, vd2: c };
    const incremental = { vd0: "incremental", vd1: "incremental", vd2: "incremental" };
    await story.start([qcow2(a), raw(b), qcow2(c)]);
    for (const disk of [0, 1]) await story.write(disk, "write -P 1 0 2097664");
    await story.write(2, "write -P 1 0 4M");
    await story.backup(images);

    for (const disk of [0, 1]) {
      await story.resize(disk, 4 * MiB);
      await story.write(disk, "write -P 2 3M 10000");
    }
    const grown = await story.backup(images);
    expect(grown.kinds).toEqual(incremental);
    expect(grown.point.disks.map(({ virtualSize }) => virtualSize)).toEqual([4 * MiB, 4 * MiB, 4 * MiB]);

    for (const disk of [0, 1, 2]) await story.resize(disk, MiB + 4 * KiB);
    const shrunk = await story.backup(images);
    expect(shrunk.kinds).toEqual(incremental);
    for (const disk of [0, 1, 2]) await story.resize(disk, 2 * MiB);
    expect((await story.backup(images)).kinds).toEqual(incremental);

    await story.proveAll();
  });

  it.each([
    ["inside a cluster", MiB + 20 * KiB],
    ["between clusters", MiB],
    ["inside a block of the file system", MiB + 64 * KiB - 512],
    ["inside the last cluster", 2 * MiB - 512],
  ])("restores zeroes where disks were cut %s and grew back between two backups", async (_where, cut) => {
    await using story = await Story.begin();
    const { rig } = story;
    const a = await rig.image("a.qcow2", "qcow2", 2 * MiB);
    const b = await rig.image("b.raw", "raw", 2 * MiB);
    const c = await createImage(rig.directory.file("c.qcow2"), "qcow2", 2 * MiB, {
      create: { cluster_size: "4k" },
    });
    const images = { vd0: a, vd1: b, vd2: c };
    await story.start([qcow2(a), raw(b), qcow2(c)]);
    const cutAll = async (): Promise<void> => {
      for (const disk of [0, 1, 2]) await story.resize(disk, cut);
      for (const disk of [0, 1, 2]) await story.resize(disk, 2 * MiB);
    };
    for (const disk of [0, 1, 2]) await story.write(disk, "write -P 3 0 2M");
    await story.backup(images);
    await cutAll();
    // The bitmaps show nothing of it.
    const back = await story.backup(images);
    expect(back.kinds).toEqual({ vd0: "incremental", vd1: "incremental", vd2: "incremental" });
    expect(back.point.disks.map(({ dirtyBytes }) => dirtyBytes)).toEqual([0, 0, 0]);

    // Again, and what is behind the cut is partly written anew.
    for (const disk of [0, 1, 2]) await story.write(disk, "write -P 4 0 2M");
    await story.backup(images);
    await cutAll();
    for (const disk of [0, 1, 2]) await story.write(disk, "write -P 5 1500k 4k", "write -P 6 2044k 4k");
    await story.backup(images);
    await story.proveAll();
  });

  it("stays incremental when qemu-img resized qcow2, also there and back", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 64 * MiB);
    const b = await story.rig.image("b.raw", "raw", 2 * MiB);
    const disks = [qcow2(a), raw(b)];
    const images = { vd0: a, vd1: b };
    await story.start(disks);
    await story.write(0, "write -P 1 0 1M", "write -P 2 31M 2M", "write -P 3 63M 1M");
    await story.write(1, "write -P 1 0 2M");
    await story.backup(images);

    await story.rig.machine.quit();
    await run("qemu-img", ["resize", "-f", "qcow2", "--shrink", a, "32M"]);
    await run("qemu-img", ["resize", "-f", "qcow2", a, "64M"]);
    await truncate(b, 3 * MiB);
    await story.start(disks);
    const back = await story.backup(images);
    expect(back.kinds).toEqual({ vd0: "incremental", vd1: RAW_RESTARTED });
    // The bitmap saw nothing; the upper half is zero all the same.
    expect(diskOf(back.point, "vd0")).toMatchObject({ dirtyBytes: 0, virtualSize: 64 * MiB });
    const upper = story.rig.directory.file("upper.raw");
    const range = ["--disk", "vd0", "--range", "32M:32M", "--to", upper];
    await story.rig.tidemark(["restore", `vm@${back.point.id}`, "--repo", story.rig.repository, ...range]);
    const zeroes = await story.rig.image("zeroes.raw", "raw", 32 * MiB);
    expect(await compareImages({ path: upper, format: "raw" }, { path: zeroes, format: "raw" })).toBe(
      "identical",
    );

    await story.restart(disks);
    await story.rig.machine.quit();
    await run("qemu-img", ["resize", "-f", "qcow2", a, String(65 * MiB + 512)]);
    await qemuIo(a, "qcow2", ["write -P 5 64M 1049088"]);
    await story.start(disks);
    expect((await story.backup(images)).kinds).toEqual({ vd0: "incremental", vd1: RAW_RESTARTED });

    await story.rig.machine.quit();
    await run("qemu-img", ["resize", "-f", "qcow2", "--shrink", a, String(31 * MiB + 4 * KiB)]);
    await story.start(disks);
    const shrunk = await story.backup(images);
    expect(shrunk.kinds).toEqual({ vd0: "incremental", vd1: RAW_RESTARTED });
    expect(diskOf(shrunk.point, "vd0").virtualSize).toBe(31 * MiB + 4 * KiB);
    await story.proveAll();
  });
});

describe("backup of disks that come, go and move", () => {
  it("follows the images by their tokens when disks with ids are added, swapped and removed", async () => {
    await using story = await Story.begin();
    const [a, b, c] = (await Promise.all(
      ["a", "b", "c"].map((name) => story.rig.image(`${name}.qcow2`, "qcow2", 2 * MiB)),
    )) as [string, string, string];
    await story.start([qcow2(a, { id: "vda" }), qcow2(b, { id: "vdb" })]);
    await story.write("vda", "write -P 0xaa 0 1M");
    await story.write("vdb", "write -P 0xbb 0 1M");
    const first = await story.backup({ vda: a, vdb: b });

    await story.restart([qcow2(c, { id: "vdc" }), qcow2(a, { id: "vda" }), qcow2(b, { id: "vdb" })]);
    await story.write("vdc", "write -P 0xcc 0 1M");
    await story.write("vdb", "write -P 0xbc 64k 1000");
    const added = await story.backup({ vda: a, vdb: b, vdc: c });
    expect(added.kinds).toEqual({ vda: "incremental", vdb: "incremental", vdc: FIRST });

    // The images change places: names are the devices', chains are the images'.
    await story.restart([qcow2(b, { id: "vda" }), qcow2(a, { id: "vdb" })]);
    await story.write("vda", "write -P 0xbd 128k 1000");
    await story.write("vdb", "write -P 0xad 192k 1000");
    const swapped = await story.backup({ vda: b, vdb: a });
    expect(swapped.kinds).toEqual({ vda: "incremental", vdb: "incremental" });
    expect(diskOf(swapped.point, "vda").token).toBe(diskOf(first.point, "vdb").token);
    expect(diskOf(swapped.point, "vdb").token).toBe(diskOf(first.point, "vda").token);
    expect(swapped.point.disks.map(({ dataClusters }) => dataClusters)).toEqual([1, 1]);

    // One that was away continues where it was left.
    await story.restart([qcow2(c, { id: "vdc" }), qcow2(b, { id: "vda" })]);
    await story.write("vdc", "write -P 0xcd 512k 1000");
    const returned = await story.backup({ vda: b, vdc: c });
    expect(returned.kinds).toEqual({ vda: "incremental", vdc: "incremental" });
    expect(diskOf(returned.point, "vdc").parent).toBe(added.point.id);
    expect(diskOf(returned.point, "vda").parent).toBe(swapped.point.id);
    await story.proveAll();
  });

  it("follows names too when the disks have no ids", async () => {
    await using story = await Story.begin();
    const [a, b, c] = (await Promise.all(
      ["a", "b", "c"].map((name) => story.rig.image(`${name}.qcow2`, "qcow2", 2 * MiB)),
    )) as [string, string, string];
    const anonymous = (path: string): TestDisk => qcow2(path, { id: null });
    await story.start([anonymous(a), anonymous(b)]);
    await story.write(0, "write -P 0xaa 0 1M");
    await story.write(1, "write -P 0xbb 0 1M");
    const first = await story.backup({ disk0: a, disk1: b });

    await story.restart([anonymous(c), anonymous(b), anonymous(a)]);
    await story.write(0, "write -P 0xcc 0 1M");
    await story.write(1, "write -P 0xbc 64k 1000");
    await story.write(2, "write -P 0xac 128k 1000");
    const moved = await story.backup({ disk0: a, disk1: b, disk2: c });
    expect(moved.kinds).toEqual({ disk0: "incremental", disk1: "incremental", disk2: FIRST });
    for (const name of ["disk0", "disk1"])
      expect(diskOf(moved.point, name).token).toBe(diskOf(first.point, name).token);

    // -drive without an id: QEMU makes up names by position (virtio0, virtio1).
    const drives = (...paths: string[]): { extraArguments: string[] } => ({
      extraArguments: paths.flatMap((path) => [
        "-drive",
        `if=virtio,format=qcow2,discard=unmap,file=${path}`,
      ]),
    });
    await story.restart([], drives(b, a));
    const named = await story.backup({ disk1: b, disk0: a });
    expect(named.kinds).toEqual({ disk0: "incremental", disk1: "incremental" });
    await story.proveAll();
  });
});

describe("backup of a choice of disks", () => {
  it("leaves the chains of the others as they were, with --disk and with --full", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 2 * MiB);
    const b = await story.rig.image("b.qcow2", "qcow2", 2 * MiB);
    const c = await story.rig.image("c.raw", "raw", 2 * MiB);
    const disks = [qcow2(a, { id: "vda" }), qcow2(b, { id: "vdb" }), raw(c, { id: "vdc" })];
    const images = { vda: a, vdb: b, vdc: c };
    await story.start(disks);
    let offset = 0;
    const touch = async (): Promise<void> => {
      offset += 100_000;
      for (const disk of [0, 1, 2]) await story.write(disk, `write -P ${1 + disk} ${offset} 1000`);
    };
    const parents = ({ disks }: PointView): (string | null)[] => disks.map(({ parent }) => parent);

    for (const disk of [0, 1, 2]) await story.write(disk, "write -P 9 0 2M");
    const all = (await story.backup(images)).point;
    await touch();
    const one = await story.backup({ vda: a }, ["--disk", "vda"]);
    expect(one.kinds).toEqual({ vda: "incremental" });
    await touch();
    const again = await story.backup(images);
    expect(again.kinds).toEqual({ vda: "incremental", vdb: "incremental", vdc: "incremental" });
    expect(parents(again.point)).toEqual([one.point.id, all.id, all.id]);

    await touch();
    const full = await story.backup({ vdb: b }, ["--disk", "vdb", "--full"]);
    expect(full.kinds).toEqual({ vdb: "asked for" });
    await touch();
    const after = await story.backup(images);
    expect(after.kinds).toEqual({ vda: "incremental", vdb: "incremental", vdc: "incremental" });
    expect(parents(after.point)).toEqual([again.point.id, full.point.id, again.point.id]);
    expect(diskOf(full.point, "vdb").token).toBe(diskOf(all, "vdb").token);

    // A disk that the newest point does not hold is not taken for a new one.
    await story.restart(disks);
    await story.backup({ vda: a }, ["--disk", "vda"]);
    expect((await story.backup(images)).kinds).toEqual({
      vda: "incremental",
      vdb: "incremental",
      vdc: RAW_RESTARTED,
    });
    for (const image of [a, b, c]) expect(await story.bitmaps(image)).toHaveLength(1);
    await story.proveAll();
  });

  it("keeps two repositories of one machine apart", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 2 * MiB);
    const b = await story.rig.image("b.raw", "raw", 2 * MiB);
    const images = { vd0: a, vd1: b };
    const hourly = story.rig.repository;
    const nightly = story.rig.directory.file("nightly");
    await story.rig.tidemark(["init", "--repo", nightly]);
    await story.start([qcow2(a), raw(b)]);
    for (const [round, repository] of [hourly, nightly, hourly, hourly, nightly, hourly].entries()) {
      for (const disk of [0, 1]) {
        await story.write(
          disk,
          `write -P ${1 + round} ${round * 200_000} 150000`,
          `discard ${round * 128}k 64k`,
        );
      }
      const extra = round === 4 ? ["--full"] : [];
      const { kinds } = await story.backup(images, extra, repository);
      const expected = round < 2 ? FIRST : round === 4 ? "asked for" : "incremental";
      expect(kinds).toEqual({ vd0: expected, vd1: expected });
    }
    // One checkpoint of each; the forced full's predecessor goes with the next backup.
    await story.backup(images, [], nightly);
    for (const image of [a, b]) expect(await story.bitmaps(image)).toHaveLength(2);
    await story.proveAll();
  });
});

describe("backup beside others", () => {
  it("leaves others' bitmaps as they are, and compares one disk alone where its own has another granularity", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 2 * MiB);
    const b = await story.rig.image("b.raw", "raw", 2 * MiB);
    const images = { vd0: a, vd1: b };
    await story.start([qcow2(a), raw(b)]);
    const { monitor } = story.rig.machine;
    const foreign = [
      { node: "node0", name: "libvirt-checkpoint", granularity: 32768, persistent: true },
      { node: "node0", name: "tidemark", granularity: 65536, persistent: true, disabled: true },
      { node: "node0", name: "tidemark.c-other-20261120T065009123Z-4f2a91", granularity: 4096 },
      { node: "node1", name: "tidemark-ffffffff-20200101T000000000Z-000000-11111111", granularity: 65536 },
      { node: "node1", name: "tm-bitmap", granularity: 65536 },
    ];
    for (const bitmap of foreign) await monitor.execute("block-dirty-bitmap-add", bitmap);
    const names = new Set(foreign.map(({ name }) => name));
    const others = async (): Promise<Bitmap[]> =>
      [...(await story.bitmaps(a)), ...(await story.bitmaps(b))].filter(({ name }) => names.has(name));
    const own = async (image: string): Promise<Bitmap[]> =>
      (await story.bitmaps(image)).filter(({ name }) => !names.has(name));

    for (const round of [0, 1, 2]) {
      for (const disk of [0, 1]) await story.write(disk, `write -P 1 ${round * 300_000} 100000`);
      const before = await others();
      expect(before).toHaveLength(foreign.length);
      await story.backup(images);
      expect(await others()).toEqual(before);
    }

    const [replaced] = await own(a);
    const node = "node0";
    const { name } = replaced!;
    await monitor.execute("block-dirty-bitmap-remove", { node, name });
    await monitor.execute("block-dirty-bitmap-add", { node, name, granularity: 32768, persistent: true });
    const before = await others();
    const { kinds } = await story.backup(images);
    expect(kinds).toEqual({
      vd0: "compared: bitmap granularity is 32768, 65536 is needed",
      vd1: "incremental",
    });
    await story.write(0, "write -P 2 1M 512");
    expect((await story.backup(images)).kinds).toEqual({ vd0: "incremental", vd1: "incremental" });
    expect((await own(a)).map(({ granularity }) => granularity)).toEqual([65536]);
    expect((await others()).map(({ name }) => name)).toEqual(before.map(({ name }) => name));
    await story.proveAll();
  });

  it("lets one of two disks with a copied image go on, and gives the other a chain of its own", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 2 * MiB);
    const copy = story.rig.directory.file("copy.qcow2");
    const original = qcow2(a, { id: "vda" });
    await story.start([original]);
    await story.write("vda", "write -P 1 0 1M");
    const first = await story.backup({ vda: a });
    await story.write("vda", "write -P 2 64k 1000");
    await story.rig.machine.quit();
    await copyFile(a, copy);

    await story.start([qcow2(copy, { id: "vdc" }), original]);
    await story.write("vda", "write -P 3 128k 1000");
    await story.write("vdc", "write -P 4 192k 1000");
    const images = { vda: a, vdc: copy };
    const both = await story.backup(images);
    expect(both.kinds).toEqual({
      vda: "incremental",
      vdc: "carries the same checkpoint as disk vda: a copied image",
    });
    expect(diskOf(both.point, "vda").token).toBe(diskOf(first.point, "vda").token);
    expect(diskOf(both.point, "vdc").token).not.toBe(diskOf(first.point, "vda").token);
    await story.write("vda", "write -P 5 256k 1000");
    await story.write("vdc", "write -P 6 320k 1000");
    expect((await story.backup(images)).kinds).toEqual({ vda: "incremental", vdc: "incremental" });
    // The original's checkpoint, which the copy brought with it, went as well.
    for (const image of [a, copy]) expect(await story.bitmaps(image)).toHaveLength(1);
    await story.proveAll();
  });

  it("goes full when the disks are in another machine, and goes on when they come home", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 2 * MiB);
    const images = { vd0: a };
    await story.start([qcow2(a)]);
    await story.write(0, "write -P 1 0 1M");
    const home = await story.backup(images);
    await story.write(0, "write -P 2 64k 1000");

    const elsewhere = { uuid: "99999999-2222-4333-8444-555555555555" };
    await story.restart([qcow2(a)], elsewhere);
    await story.write(0, "write -P 3 128k 1000");
    expect((await story.backup(images)).kinds).toEqual({
      vd0: `point ${home.point.id} belongs to another machine`,
    });
    await story.write(0, "write -P 4 192k 1000");
    expect((await story.backup(images)).kinds).toEqual({ vd0: "incremental" });

    await story.restart([qcow2(a)]);
    await story.write(0, "write -P 5 256k 1000");
    const back = await story.backup(images);
    expect(back.kinds).toEqual({ vd0: "incremental" });
    expect(diskOf(back.point, "vd0").parent).toBe(home.point.id);
    await story.proveAll();
  });
});

describe("backup of what a guest does to its disks", () => {
  it("restores discarded ranges as zeroes and parts of clusters as written, of a paused machine too", async () => {
    await using story = await Story.begin();
    const { rig } = story;
    const a = await rig.image("a.qcow2", "qcow2", 2 * MiB + 48 * KiB);
    const b = await rig.image("b.raw", "raw", 2 * MiB + 48 * KiB);
    const images = { vd0: a, vd1: b };
    const stored = ({ disks }: PointView): number[][] =>
      disks.map(({ dataClusters, zeroClusters }) => [dataClusters, zeroClusters]);
    // All that the guest writes is below 128 KiB.
    const guest = { trailOffset: 66 * KiB, trailBlocks: 2, trailStride: 512 };
    await story.start([qcow2(a), raw(b)], { guest });
    await rig.machine.waitForGuestWriting(4);
    const running = await story.backup(images);
    expect(running.point.state).toBe("running");
    await rig.machine.monitor.execute("stop");
    for (const disk of [0, 1]) await story.write(disk, "write -P 1 128k 1968k");
    const paused = await story.backup(images);
    expect(paused.point.state).toBe("paused");
    expect(await rig.machine.monitor.execute("query-status")).toMatchObject({ running: false });

    // Nothing happened: nothing is stored.
    expect(stored((await story.backup(images)).point)).toEqual([
      [0, 0],
      [0, 0],
    ]);

    for (const disk of [0, 1]) {
      // Two whole clusters and a quarter of a third; then the end of the disk, which is part of a cluster.
      await story.write(disk, "discard 256k 144k", "discard 2M 48k");
    }
    const discarded = await story.backup(images);
    expect(stored(discarded.point)).toEqual([
      [1, 3],
      [1, 3],
    ]);
    const target = rig.directory.file("discarded");
    const restore = ["restore", `vm@${discarded.point.id}`, "--repo", rig.repository, "--to-dir", target];
    await rig.tidemark([...restore, "--quiet"]);
    for (const disk of ["vd0", "vd1"]) {
      const bytes = await readFile(`${target}/${disk}.raw`);
      // The quarter is zeroes or ones: what a discard of less than a cluster does is the machine's matter.
      expect(bytes.subarray(256 * KiB, 384 * KiB).equals(Buffer.alloc(128 * KiB))).toBe(true);
      expect(bytes.subarray(400 * KiB, 2 * MiB).equals(Buffer.alloc(2 * MiB - 400 * KiB, 1))).toBe(true);
      expect(bytes.subarray(2 * MiB).equals(Buffer.alloc(48 * KiB))).toBe(true);
    }

    for (const disk of [0, 1]) {
      await story.write(
        disk,
        ...["write -P 2 528k 16k", "write -z 608k 16k", "write -z -u 640k 48k", "write -P 3 272k 16k"],
        ...["discard 784k 96k", "write -P 4 2080k 16k"],
      );
    }
    expect(stored((await story.backup(images)).point)).toEqual([
      [7, 0],
      [7, 0],
    ]);
    await rig.machine.monitor.execute("cont");
    await rig.machine.waitForGuestWriting(4);
    expect((await story.backup(images)).point.state).toBe("running");
    await story.proveAll();
  });
});
