import { mkdir, readFile, stat, writeFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { checkImage, CLEAN, compareImages, createImage, imageInfo, qemuIo, toRaw } from "../support/image.js";
import { NbdRelay } from "../support/nbd-relay.js";
import { startNbdkit, startQemuNbd } from "../support/nbd-servers.js";
import { Rig, type PointView } from "../support/rig.js";
import { run } from "../support/tools.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const SIZE = 12 * MiB + 512;

interface Stored {
  readonly image: string;
  readonly first: PointView;
  readonly second: PointView;
  /** Raw files with what the disk held at each point. */
  readonly held: { readonly first: string; readonly second: string };
}

/** A machine with one disk and two points of it: 9 MiB of data, then 320 KiB changed and 1 MiB discarded. */
async function twoPoints(rig: Rig): Promise<Stored> {
  const image = await rig.image("disk.qcow2", "qcow2", SIZE);
  await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
  await rig.machine.qemuIoAll("vda", [
    "write -P 0x11 0 8M",
    `write -P 0x22 ${10 * MiB} 1M`,
    `write -P 0x33 ${12 * MiB} 512`,
  ]);
  const first = await rig.backup();
  await rig.machine.qemuIoAll("vda", ["write -P 0x44 1M 256k", "write -P 0x55 5000 512", "discard 4M 1M"]);
  const second = await rig.backup();
  return {
    image,
    first,
    second,
    held: { first: rig.reference(first, image), second: rig.reference(second, image) },
  };
}

/** Restores to a target. @returns exit code, stderr, and the result's disk */
async function restoreTo(rig: Rig, reference: string, to: string, ...more: string[]) {
  const args = ["restore", reference, "--repo", rig.repository, "--to", to, "--json", ...more];
  const result = await rig.run(args);
  const events = result.events();
  const last = events.at(-1) as { message?: string; disks?: { bytes: number; writtenBytes: number }[] };
  return { code: result.code, message: last.message ?? "", events, disk: last.disks?.[0] };
}

/** Whether a server says that all connections see one state, as nbdinfo reads it. */
async function offersSeveral(uri: string): Promise<boolean> {
  const { stdout } = await run("nbdinfo", ["--json", uri]);
  const { exports } = JSON.parse(stdout) as { exports: { can_multi_conn: boolean }[] };
  return exports[0]?.can_multi_conn === true;
}

describe("restore to an NBD export", () => {
  it.each(["unix", "tcp"] as const)(
    "writes through several connections, and leaves no stale byte (%s)",
    async (transport) => {
      await using rig = await Rig.create();
      const { held } = await twoPoints(rig);
      const target = await createImage(rig.directory.file("target.qcow2"), "qcow2", SIZE);
      await qemuIo(target, "qcow2", [`write -P 0xee 0 ${SIZE}`]);
      {
        await using server = await startQemuNbd({
          ...{ transport, image: target, format: "qcow2", exportName: "disk", writable: true },
        });
        const refused = await restoreTo(rig, "vm", server.uri("disk"));
        expect(refused.code).toBe(2);
        expect(refused.message).toContain("holds data");
        const done = await restoreTo(rig, "vm", server.uri("disk"), "--force");
        expect(done).toMatchObject({ code: 0, disk: { bytes: SIZE, writtenBytes: SIZE } });
      }
      const reference = { path: held.second, format: "raw" } as const;
      expect(await compareImages({ path: target, format: "qcow2" }, reference)).toBe("identical");
      expect(await checkImage(target)).toMatchObject(CLEAN);
    },
  );

  it("has writes in flight on four connections at once where the server takes several", async () => {
    await using rig = await Rig.create();
    const { held } = await twoPoints(rig);
    const target = await createImage(rig.directory.file("target.raw"), "raw", SIZE);
    await using server = await startQemuNbd({
      ...{ image: target, format: "raw", exportName: "disk", writable: true },
    });
    expect(await offersSeveral(server.uri("disk"))).toBe(true);
    await using relay = await NbdRelay.start(rig.directory.file("relay"), server.address, 4);
    const uri = `nbd+unix:///disk?socket=${relay.socket}`;
    expect(await restoreTo(rig, "vm", uri, "--force")).toMatchObject({ code: 0 });
    expect(relay.written).toHaveLength(4);
    expect(relay.mostOpen).toBe(4);
    // All the data (9 MiB and the last 512 bytes, without the discarded MiB) once, and requests, small beside it.
    const data = 8 * MiB + 512;
    const sent = relay.written.reduce((sum, bytes) => sum + bytes, 0);
    expect(sent).toBeGreaterThan(data);
    expect(sent).toBeLessThan(data + MiB);
    expect((await readFile(target)).equals(await readFile(held.second))).toBe(true);
  });

  it.each(["qemu-nbd for one client", "nbdkit without multi-conn"])(
    "uses one connection where the server does not say that several see one state: %s",
    async (kind) => {
      await using rig = await Rig.create();
      const { held } = await twoPoints(rig);
      const target = await createImage(rig.directory.file("target.raw"), "raw", SIZE);
      await using server = kind.startsWith("nbdkit")
        ? await startNbdkit({
            parameters: ["--filter=multi-conn", "file", target, "multi-conn-mode=disable"],
          })
        : await startQemuNbd({
            ...{ image: target, format: "raw", exportName: "", writable: true, extra: ["--shared=1"] },
          });
      expect(await offersSeveral(server.uri(""))).toBe(false);
      await using relay = await NbdRelay.start(rig.directory.file("relay"), server.address, 1);
      const uri = `nbd+unix:///?socket=${relay.socket}`;
      expect(await restoreTo(rig, "vm", uri, "--force")).toMatchObject({ code: 0 });
      expect(relay.written).toHaveLength(1);
      expect(relay.mostOpen).toBe(1);
      expect((await readFile(target)).equals(await readFile(held.second))).toBe(true);
    },
  );

  it("is interrupted with exit 130 while the server is silent", async () => {
    await using rig = await Rig.create();
    await twoPoints(rig);
    await using server = await startNbdkit({ parameters: ["memory", "13M"] });
    // No write is answered before as many connections write as never will.
    await using relay = await NbdRelay.start(rig.directory.file("relay"), server.address, 99);
    const uri = `nbd+unix:///?socket=${relay.socket}`;
    const args = ["restore", "vm", "--repo", rig.repository, "--to", uri, "--json", "--force"];
    await using running = startTidemark(args, { env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") } });
    await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    running.kill("SIGINT");
    const asked = performance.now();
    expect((await running.ended).code).toBe(130);
    expect(performance.now() - asked).toBeLessThan(15_000);
  });

  it("needs no --force for an export that reads as zero, and refuses a read-only one", async () => {
    await using rig = await Rig.create();
    const { held } = await twoPoints(rig);
    const target = await createImage(rig.directory.file("target.raw"), "raw", SIZE);
    {
      await using server = await startQemuNbd({
        image: target,
        format: "raw",
        exportName: "",
        writable: true,
      });
      expect((await restoreTo(rig, "vm@latest~1", server.uri(""))).code).toBe(0);
    }
    expect((await readFile(target)).equals(await readFile(held.first))).toBe(true);
    await using server = await startQemuNbd({ image: target, format: "raw", exportName: "" });
    const refused = await restoreTo(rig, "vm", server.uri(""), "--force");
    expect(refused.code).toBe(2);
    expect(refused.message).toContain("read-only");
    const missing = await restoreTo(rig, "vm", server.uri("other"), "--force");
    expect(missing.code).toBe(4);
  });

  it("--only-changed reads, and writes only what differs", async () => {
    await using rig = await Rig.create();
    const { held } = await twoPoints(rig);
    const target = await toRaw(held.first, "raw", rig.directory.file("target.raw"));
    await using server = await startQemuNbd({
      image: target,
      format: "raw",
      exportName: "d",
      writable: true,
    });
    const done = await restoreTo(rig, "vm", server.uri("d"), "--only-changed", "--force");
    // 256 KiB, the one 4 KiB step that 512 bytes at 5000 lie in, and the discarded 1 MiB.
    expect(done).toMatchObject({ code: 0, disk: { bytes: SIZE, writtenBytes: 256 * KiB + 4 * KiB + MiB } });
    expect((await readFile(target)).equals(await readFile(held.second))).toBe(true);
    const again = await restoreTo(rig, "vm", server.uri("d"), "--only-changed", "--force");
    expect(again).toMatchObject({ code: 0, disk: { writtenBytes: 0 } });
  });
});

describe("restore to a block device", () => {
  it("leaves no stale byte, takes a larger device, and refuses a mounted one", async () => {
    await using rig = await Rig.create();
    const { held } = await twoPoints(rig);
    const backing = rig.directory.file("device.img");
    await writeFile(backing, Buffer.alloc(SIZE + 3 * MiB, 0xee));
    await using device = await loopDevice(backing);
    expect((await restoreTo(rig, "vm", device.path)).code).toBe(2);
    const done = await restoreTo(rig, "vm", device.path, "--force");
    expect(done).toMatchObject({ code: 0, disk: { bytes: SIZE } });
    await run("sync", [device.path]);
    const bytes = await readFile(backing);
    expect(bytes.subarray(0, SIZE).equals(await readFile(held.second))).toBe(true);
    expect(bytes.subarray(SIZE).every((byte) => byte === 0xee)).toBe(true);

    const changed = await restoreTo(rig, "vm@latest~1", device.path, "--force", "--only-changed");
    expect(changed).toMatchObject({ code: 0, disk: { writtenBytes: 256 * KiB + 4 * KiB + MiB } });
    await run("sync", [device.path]);
    expect((await readFile(backing)).subarray(0, SIZE).equals(await readFile(held.first))).toBe(true);

    await run("mkfs.ext4", ["-q", "-F", device.path]);
    const mount = rig.directory.file("mount");
    await mkdir(mount);
    await run("mount", [device.path, mount]);
    try {
      const busy = await restoreTo(rig, "vm", device.path, "--force");
      expect(busy.code).toBe(5);
      expect(busy.message).toContain("mounted");
    } finally {
      await run("umount", [mount]);
    }
  });

  it("takes a smaller device only if everything beyond its end is zero", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("disk.qcow2", "qcow2", 8 * MiB);
    await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
    await rig.machine.qemuIoAll("vda", ["write -P 1 0 2M", "write -P 2 5M 4k"]);
    await rig.backup(["--name", "long"]);
    await rig.machine.qemuIoAll("vda", ["write -P 0 5M 4k", "write -P 3 1M 4k"]);
    const short = await rig.backup(["--name", "short"]);

    const backing = rig.directory.file("device.img");
    await writeFile(backing, Buffer.alloc(4 * MiB, 0xee));
    await using device = await loopDevice(backing);
    const refused = await restoreTo(rig, "vm@long", device.path, "--force");
    expect(refused.code).toBe(2);
    expect(refused.message).toContain("holds data beyond");
    expect((await readFile(backing)).every((byte) => byte === 0xee)).toBe(true);
    expect(await restoreTo(rig, "vm@short", device.path, "--force")).toMatchObject({
      code: 0,
      disk: { bytes: 4 * MiB },
    });
    await run("sync", [device.path]);
    const held = await readFile(rig.reference(short, image));
    expect((await readFile(backing)).equals(held.subarray(0, 4 * MiB))).toBe(true);
  });
});

describe("restore over an existing file", () => {
  it("raw: replaced with --force, changed in place with --only-changed", async () => {
    await using rig = await Rig.create();
    const { held } = await twoPoints(rig);
    const target = rig.directory.file("target.raw");
    await writeFile(target, Buffer.alloc(SIZE + MiB, 0xee));
    expect((await restoreTo(rig, "vm", target, "--only-changed")).code).toBe(2);
    expect((await restoreTo(rig, "vm@latest~1", target, "--force")).code).toBe(0);
    expect((await readFile(target)).equals(await readFile(held.first))).toBe(true);

    const { ino } = await stat(target);
    const changed = await restoreTo(rig, "vm", target, "--force", "--only-changed");
    expect(changed).toMatchObject({ code: 0, disk: { writtenBytes: 256 * KiB + 4 * KiB + MiB } });
    expect((await readFile(target)).equals(await readFile(held.second))).toBe(true);
    expect((await stat(target)).ino).toBe(ino);
  });

  it("qcow2: changed in place through a storage daemon, so that its bitmaps stay true", async () => {
    await using rig = await Rig.create();
    const { image, held } = await twoPoints(rig);
    const args = ["--format", "qcow2", "--only-changed", "--force"];
    const busy = await restoreTo(rig, "vm", image, ...args);
    expect(busy.code).toBe(5);
    await rig.machine.quit();
    const raw = await restoreTo(rig, "vm", image, "--format", "raw", "--only-changed", "--force");
    expect(raw).toMatchObject({ code: 2, message: expect.stringContaining("qcow2 image") as string });

    const bitmaps = async () => (await imageInfo(image))["format-specific"]?.data.bitmaps ?? [];
    const before = await bitmaps();
    expect(before).toHaveLength(1);
    const done = await restoreTo(rig, "vm@latest~1", image, ...args);
    expect(done).toMatchObject({ code: 0, disk: { writtenBytes: 256 * KiB + 4 * KiB + MiB } });
    const reference = { path: held.first, format: "raw" } as const;
    expect(await compareImages({ path: image, format: "qcow2" }, reference)).toBe("identical");
    expect(await checkImage(image)).toMatchObject(CLEAN);
    expect(await bitmaps()).toEqual(before);

    // The checkpoint in the image recorded what the restore changed: the next backup is an increment, and right.
    await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
    const next = await rig.backup();
    expect(next.disks[0]?.kind).toBe("incremental");
    expect(await rig.verify(next, { vda: image })).toEqual({ vda: "identical" });
    const same = await compareImages({ path: rig.reference(next, image), format: "raw" }, reference);
    expect(same).toBe("identical");
  });

  it("a range never goes in place, and a failed restore in place says what is left", async () => {
    await using rig = await Rig.create();
    const { first } = await twoPoints(rig);
    const target = rig.directory.file("target.raw");
    await writeFile(target, Buffer.alloc(SIZE, 0xee));
    const part = await restoreTo(rig, "vm", target, "--force", "--only-changed", "--range", "0:1M");
    expect(part.code).toBe(2);
    expect((await readFile(target)).every((byte) => byte === 0xee)).toBe(true);

    const path = `${rig.repository}/vm/${first.id}/vda.qcow2`;
    const stored = await readFile(path);
    stored[64 * KiB + 9] = (stored[64 * KiB + 9] ?? 0) ^ 0x55;
    await writeFile(path, stored);
    const failed = await restoreTo(rig, "vm@latest~1", target, "--force", "--only-changed");
    expect(failed.code).toBe(6);
    expect(failed.events.find(({ event }) => event === "warning")?.["message"]).toContain("a part of disk");
  });
});

/** Attaches a file to a loop device. */
async function loopDevice(file: string): Promise<AsyncDisposable & { readonly path: string }> {
  const { stdout } = await run("losetup", ["--find", "--show", file]);
  const path = stdout.trim();
  return {
    path,
    async [Symbol.asyncDispose]() {
      await run("losetup", ["--detach", path]);
    },
  };
}
