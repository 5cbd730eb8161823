import { open, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import {
  checkImage,
  CLEAN,
  compareImages,
  createImage,
  qemuIo,
  toRaw,
  writeNoise,
} from "../support/image.js";
import type { TestDisk } from "../support/qemu.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";

/** All of a point that these tests look at. */
type Disk = PointView["disks"][number];

const MISSING = "compared: checkpoint bitmap missing (raw disk, QEMU restarted)";
const INCONSISTENT = "compared: bitmap inconsistent: QEMU did not shut down cleanly";
const LOST = "compared: checkpoint bitmap missing (disk replaced, or QEMU was killed before it was stored)";
const ASKED = "compared: --compare was given";

const qcow2 = (path: string): TestDisk => ({ path, format: "qcow2" });
const raw = (path: string): TestDisk => ({ path, format: "raw" });

function only({ disks }: PointView): Disk {
  const [disk, ...more] = disks;
  if (disk === undefined || more.length > 0) throw new Error(`The point has ${disks.length} disks`);
  return disk;
}

/** Fills an image with noise, no two clusters alike. */
async function fillWithNoise(rig: Rig, path: string, format: "raw" | "qcow2", length: number): Promise<void> {
  const noise = await writeNoise(rig.directory.file("noise"), length, length);
  await qemuIo(path, format, [`write -s ${noise} 0 ${length}`]);
}

async function start(rig: Rig, disks: readonly TestDisk[]): Promise<void> {
  await rig.start(disks, { guest: "none", deadline: 240_000 });
}

/** Makes everything of the image unreadable where frames lie: what a comparison must not need. */
async function destroyFrames(rig: Rig, point: PointView): Promise<() => Promise<void>> {
  const path = `${rig.repository}/vm/${point.id}/${only(point).image}`;
  const kept = await readFile(path);
  const manifest = JSON.parse(await readFile(`${rig.repository}/vm/${point.id}/point.json`, "utf8")) as {
    disks: { segments: { offset: number; length: number; kind: string }[] }[];
  };
  const frames = (manifest.disks[0]?.segments ?? []).filter(({ kind }) => kind === "data");
  expect(frames.length).toBeGreaterThan(0);
  await using file = await open(path, "r+");
  for (const { offset, length } of frames) await file.write(Buffer.alloc(length, 0xdb), 0, length, offset);
  return () => writeFile(path, kept);
}

/** What `status` says about the next backup of the only disk. */
async function nextOf(rig: Rig): Promise<unknown> {
  const args = ["status", "--qmp", rig.proxy.socket, "--machine", "vm", "--repo", rig.repository, "--json"];
  const { disks } = (await rig.tidemark(args)).json() as { disks: { next: unknown }[] };
  return disks[0]?.next;
}

describe("backup that compares", () => {
  it("stores only what differs of a raw disk after a restart, and reads no stored data for it", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.raw", "raw", 32 * MiB + 512);
    await fillWithNoise(rig, image, "raw", 16 * MiB);
    await start(rig, [raw(image)]);
    const first = await rig.backup();
    await rig.machine.qemuIoAll(0, ["write -P 7 1M 100k", "write -z 2M 64k"]);
    const second = await rig.backup();
    expect(only(second)).toMatchObject({ kind: "incremental", reason: null });

    await rig.machine.quit();
    // Changed by whoever it was while no bitmap recorded: within clusters, to zero, in what was zero, at the end.
    await qemuIo(image, "raw", [
      "write -P 9 5M 512",
      "write -z 8M 128k",
      // Zeroes that no map shows: over data, and where there were zeroes before.
      "write -P 0 10M 64k",
      "write -P 0 25M 64k",
      "write -P 3 20M 64k",
      `write -P 4 ${32 * MiB} 512`,
    ]);
    await start(rig, [raw(image)]);
    expect(await nextOf(rig)).toEqual({
      kind: "incremental",
      reason: MISSING.replace("compared", "will be compared"),
      parent: second.id,
    });
    const restore = [await destroyFrames(rig, first), await destroyFrames(rig, second)];
    const third = await rig.backup();
    for (const heal of restore) await heal();
    expect(only(third)).toMatchObject({
      ...{ kind: "incremental", reason: MISSING, parent: second.id, token: only(second).token },
      ...{ dataClusters: 3, zeroClusters: 3, dirtyBytes: null },
    });
    expect(only(third).bytes).toBeLessThan(512 * KiB);
    await rig.machine.qemuIoAll(0, ["write -P 1 30M 1000"]);
    const fourth = await rig.backup();
    expect(only(fourth)).toMatchObject({ kind: "incremental", reason: null, dataClusters: 1 });
    for (const point of [first, second, third, fourth]) {
      expect(await rig.verify(point, { vd0: image })).toEqual({ vd0: "identical" });
      expect(await checkImage(`${rig.repository}/vm/${point.id}/vd0.qcow2`)).toMatchObject(CLEAN);
    }
    const shown = await rig.tidemark(["show", `vm@${third.id}`, "--repo", rig.repository]);
    expect(shown.stdout).toContain(`vd0 is incremental, ${MISSING}`);
  });

  it("stores only what differs of a qcow2 disk after QEMU was killed, with and without its bitmap", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.qcow2", "qcow2", 16 * MiB);
    await fillWithNoise(rig, image, "qcow2", 16 * MiB);
    await start(rig, [qcow2(image)]);
    const first = await rig.backup();
    // The bitmap was never stored: QEMU's end takes it along.
    await rig.machine.qemuIoAll(0, ["write -P 8 3M 64k", "flush"]);
    await rig.machine.kill();

    await start(rig, [qcow2(image)]);
    const second = await rig.backup();
    expect(only(second)).toMatchObject({
      ...{ kind: "incremental", reason: LOST, parent: first.id },
      ...{ dataClusters: 1, zeroClusters: 0 },
    });
    await rig.machine.quit();
    await start(rig, [qcow2(image)]);
    await rig.machine.qemuIoAll(0, ["write -P 7 1M 100k", "discard 4M 64k", "flush"]);
    await rig.machine.kill();

    await start(rig, [qcow2(image)]);
    const third = await rig.backup();
    expect(only(third)).toMatchObject({ kind: "incremental", reason: INCONSISTENT, parent: second.id });
    expect(only(third).dataClusters + only(third).zeroClusters).toBe(3);
    for (const point of [first, second, third])
      expect(await rig.verify(point, { vd0: image })).toEqual({ vd0: "identical" });
  });

  it("finds with --compare what a bitmap lost behind its back, where the plain increment does not", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.qcow2", "qcow2", 8 * MiB);
    await fillWithNoise(rig, image, "qcow2", 4 * MiB);
    await start(rig, [qcow2(image)]);
    const first = await rig.backup();
    const forget = async (): Promise<void> => {
      const bitmaps = (
        await rig.machine.monitor.execute<{ "node-name": string; "dirty-bitmaps"?: { name: string }[] }[]>(
          "query-named-block-nodes",
        )
      ).flatMap(({ "node-name": node, "dirty-bitmaps": found }) =>
        (found ?? []).map(({ name }) => ({ node, name })),
      );
      expect(bitmaps.length).toBeGreaterThan(0);
      for (const bitmap of bitmaps) await rig.machine.monitor.execute("block-dirty-bitmap-clear", bitmap);
    };
    await rig.machine.qemuIoAll(0, ["write -P 5 100k 1k", "write -z 1M 64k", "write -P 6 6M 64k"]);
    await forget();
    const blind = await rig.backup();
    // Zeroes over data show in the allocation map.
    expect(only(blind)).toMatchObject({ reason: null, dataClusters: 0, zeroClusters: 1 });
    expect(await rig.verify(blind, { vd0: image })).not.toEqual({ vd0: "identical" });

    const compared = await rig.backup(["--compare"]);
    expect(only(compared)).toMatchObject({
      ...{ kind: "incremental", reason: ASKED, parent: blind.id, dirtyBytes: null },
      ...{ dataClusters: 2, zeroClusters: 0 },
    });
    const again = await rig.backup(["--compare"]);
    expect(only(again)).toMatchObject({ reason: ASKED, dataClusters: 0, zeroClusters: 0 });
    await rig.machine.qemuIoAll(0, ["write -P 7 3M 64k"]);
    const plain = await rig.backup();
    expect(only(plain)).toMatchObject({ kind: "incremental", reason: null, dataClusters: 1 });
    for (const point of [first, compared, again, plain])
      expect(await rig.verify(point, { vd0: image })).toEqual({ vd0: "identical" });

    const both = await rig.run(rig.backupArguments(["--compare", "--full"]));
    expect(both.code).toBe(2);
  });

  it("compares a disk that was replaced, grew and shrank with what was there under its name", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.raw", "raw", 5 * MiB + 1536);
    await fillWithNoise(rig, image, "raw", 5 * MiB + 1536);
    await start(rig, [raw(image)]);
    const points = [await rig.backup()];
    for (const [size, place] of [
      [3 * MiB + 512, 1 * MiB],
      [6 * MiB + 20 * KiB, 2 * MiB],
      [6 * MiB + 10 * KiB, 3 * MiB],
      [9 * MiB, 8 * MiB],
    ] as const) {
      await rig.machine.quit();
      // The content of before up to there, in a new file, and something new.
      const replaced = await rig.image("b.raw", "raw", size);
      const kept = (await readFile(image)).subarray(0, size);
      await using file = await open(replaced, "r+");
      await file.write(kept, 0, kept.length, 0);
      await file.write(Buffer.alloc(1000, points.length), 0, 1000, place);
      await rename(replaced, image);
      await start(rig, [raw(image)]);
      const point = await rig.backup();
      points.push(point);
      expect(only(point)).toMatchObject({ kind: "incremental", reason: MISSING, virtualSize: size });
      // What was written, and no more than the clusters in which one of the disks ends.
      expect(only(point).dataClusters).toBeGreaterThanOrEqual(1);
      expect(only(point).dataClusters).toBeLessThanOrEqual(3);
      expect(only(point).zeroClusters).toBe(0);
    }
    for (const point of points) expect(await rig.verify(point, { vd0: image })).toEqual({ vd0: "identical" });
  });

  it("goes full, and says why, where hashes or images of the parent are not what they were", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.raw", "raw", 4 * MiB);
    await fillWithNoise(rig, image, "raw", 2 * MiB);
    const attempt = async (): Promise<PointView> => {
      await rig.machine.quit();
      await start(rig, [raw(image)]);
      const point = await rig.backup();
      expect(await rig.verify(point, { vd0: image })).toEqual({ vd0: "identical" });
      return point;
    };
    const path = (point: PointView, file: string): string => `${rig.repository}/vm/${point.id}/${file}`;
    await start(rig, [raw(image)]);
    const first = await rig.backup();

    await rm(path(first, "vd0.hashes"));
    const second = await attempt();
    expect(only(second).kind).toBe("full");
    expect(only(second).reason).toMatch(/QEMU restarted\); cannot compare: .*vd0.hashes.*missing/);

    const hashes = await readFile(path(second, "vd0.hashes"));
    const header = Buffer.from(hashes);
    header.writeUInt8(header.readUInt8(30) ^ 1, 30);
    await writeFile(path(second, "vd0.hashes"), header);
    const third = await attempt();
    expect(only(third).reason).toMatch(/cannot compare: .*vd0.hashes": its header is not what was stored/);

    const body = await readFile(path(third, "vd0.hashes"));
    body.writeUInt8(body.readUInt8(2500) ^ 1, 2500);
    await writeFile(path(third, "vd0.hashes"), body);
    await rig.machine.quit();
    await start(rig, [raw(image)]);
    const events = (await rig.tidemark(rig.backupArguments())).events();
    const fourth = pointOf(events);
    expect(events).toContainEqual({
      event: "warning",
      message: expect.stringMatching(/"vd0" is stored anew where hashes are damaged/) as string,
    });
    // One block describes the whole disk.
    expect(only(fourth)).toMatchObject({ kind: "incremental", reason: MISSING, dataClusters: 32 });
    const restored = await rig.restore(fourth);
    expect(
      await compareImages({ path: `${restored}/vd0.raw`, format: "raw" }, { path: image, format: "raw" }),
    ).toBe("identical");

    await rm(path(fourth, "vd0.qcow2"));
    const fifth = await attempt();
    expect(only(fifth).reason).toMatch(/cannot compare: parent damaged: .*missing/);
    expect(only(fifth).kind).toBe("full");
  });
});

describe("backup of raw images of a machine that is off", () => {
  it("is an increment by comparing from the second on", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.raw", "raw", 24 * MiB);
    await fillWithNoise(rig, image, "raw", 24 * MiB);
    const backup = async (...more: string[]): Promise<PointView> => {
      const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `d=${image}`];
      return pointOf((await rig.tidemark([...args, ...more])).events());
    };
    const points: [PointView, string][] = [];
    for (let round = 0; round < 3; round += 1) {
      await qemuIo(image, "raw", [`write -P ${round + 1} ${round * MiB} 100k`]);
      const point = await backup();
      points.push([point, await toRaw(image, "raw", rig.directory.file(`held-${round}.raw`))]);
      expect(only(point).kind).toBe(round === 0 ? "full" : "incremental");
      if (round > 0)
        expect(only(point)).toMatchObject({ dataClusters: 2, parent: points[round - 1]?.[0].id });
    }
    for (const [point, held] of points) {
      const reference = { path: held, format: "raw" } as const;
      const restored = { path: `${await rig.restore(point)}/d.raw`, format: "raw" } as const;
      expect(await compareImages(restored, reference)).toBe("identical");
      const bare = { path: `${rig.repository}/vm/${point.id}/d.qcow2`, format: "qcow2" } as const;
      expect(await compareImages(bare, reference)).toBe("identical");
      // Sixteen bytes for 64 KiB, and what the bitmaps of a block take.
      const { size } = await stat(`${rig.repository}/vm/${point.id}/d.hashes`);
      expect(size).toBe(104 + 2048 + 40 + 16 * only(point).dataClusters);
    }
    expect((await readdir(`${rig.repository}/vm/${points[0]?.[0].id ?? ""}`)).sort()).toEqual([
      "d.hashes",
      "d.qcow2",
      "point.json",
    ]);
  });

  it("is full where the user wants it", async () => {
    await using rig = await Rig.create();
    const image = await createImage(rig.directory.file("a.raw"), "raw", MiB);
    await qemuIo(image, "raw", ["write -P 1 0 1M"]);
    const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `d=${image}`];
    await rig.tidemark(args);
    const point = pointOf((await rig.tidemark([...args, "--full"])).events());
    expect(only(point)).toMatchObject({ kind: "full", dataClusters: 16 });
    const restored = { path: `${await rig.restore(point)}/d.raw`, format: "raw" } as const;
    expect(await compareImages(restored, { path: image, format: "raw" })).toBe("identical");
  });
});
