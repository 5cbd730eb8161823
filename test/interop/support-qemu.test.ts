import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile, writeFile } from "node:fs/promises";
import { existsSync, readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { readCounter, readTrail } from "../support/guest.js";
import { compareImages, createImage, qemuIo, sha256OfDisk, toRaw } from "../support/image.js";
import { startMachine, type Bus } from "../support/qemu.js";
import { temporaryDirectory } from "../support/temporary.js";

const SIZE = 32 * MiB;

/** Whether that process is there and QEMU: a zombie has no command line. */
function isQemu(pid: number): boolean {
  const path = `/proc/${pid}/cmdline`;
  return existsSync(path) && readFileSync(path, "utf8").includes("qemu-system");
}

describe("startMachine()", () => {
  const buses: { bus: Bus; style: "drive" | "blockdev"; iothread?: boolean }[] = [
    { bus: "virtio-blk", style: "blockdev" },
    { bus: "virtio-blk", style: "drive" },
    { bus: "virtio-blk", style: "blockdev", iothread: true },
    { bus: "virtio-scsi", style: "blockdev" },
    { bus: "virtio-scsi", style: "blockdev", iothread: true },
    { bus: "ide", style: "drive" },
    { bus: "sata", style: "blockdev" },
    { bus: "nvme", style: "drive" },
  ];
  it.each(buses)(
    "boots the counting guest from $bus, $style (iothread: $iothread), and its counters keep their order",
    async ({ bus, style, iothread = false }) => {
      await using directory = await temporaryDirectory();
      const first = await createImage(directory.file("a.qcow2"), "qcow2", SIZE);
      const second = await createImage(directory.file("b.raw"), "raw", SIZE);
      await using machine = await startMachine({
        guest: "counter",
        disks: [
          { path: first, format: "qcow2", bus, style, iothread },
          { path: second, format: "raw", bus, style, iothread },
        ],
      });
      await machine.waitForGuestWriting(600);
      expect(await machine.quit()).toEqual({ code: 0, signal: null });
      const counters = [
        await readTrail(await toRaw(first, "qcow2", directory.file("a.raw"))),
        await readTrail(second),
      ];
      expect(counters[0]).toBeGreaterThanOrEqual(300);
      expect([0, 1]).toContain(counters[0]! - counters[1]!);
    },
  );

  it("goes on counting after a SIGKILL, the order of the disks kept", async () => {
    await using directory = await temporaryDirectory();
    const paths = [directory.file("a.raw"), directory.file("b.raw"), directory.file("c.raw")];
    for (const path of paths) await createImage(path, "raw", SIZE);
    const disks = paths.map((path) => ({ path, format: "raw" as const }));
    let last = 0;
    for (let round = 0; round < 3; round += 1) {
      await using machine = await startMachine({ guest: "counter", disks });
      await machine.waitForGuestWriting(50);
      expect(await machine.kill()).toEqual({ code: null, signal: "SIGKILL" });
      const [a, b, c] = [await readTrail(paths[0]!), await readTrail(paths[1]!), await readTrail(paths[2]!)];
      expect(a).toBeGreaterThan(last);
      expect([a - b, b - c, a - c].every((difference) => difference === 0 || difference === 1)).toBe(true);
      last = a;
    }
  });

  it("paces the guest by stepsPerTick, keeps to its trail and to the disks it may write", async () => {
    await using directory = await temporaryDirectory();
    const first = await createImage(directory.file("a.raw"), "raw", SIZE);
    const second = await createImage(directory.file("b.raw"), "raw", SIZE);
    const guest = { stepsPerTick: 2, trailBlocks: 8, trailOffset: 4 * MiB, trailStride: 2 * MiB, disks: 1 };
    await using machine = await startMachine({
      guest,
      disks: [
        { path: first, format: "raw" },
        { path: second, format: "raw" },
      ],
    });
    const start = performance.now();
    await machine.waitForGuestWriting(40, [0]);
    // 20 steps are 10 ticks of 55 ms; the first may come at once.
    expect(performance.now() - start).toBeGreaterThan(8 * 55);
    await machine.quit();
    expect(await readTrail(first, guest)).toBeGreaterThanOrEqual(20);
    expect(await readCounter(second)).toBe(0);
  });

  it("writes nothing but a boot sector with the idle guest, and not even that with none", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.qcow2"), "qcow2", SIZE);
    const empty = await sha256OfDisk(path, "qcow2");
    {
      await using machine = await startMachine({ guest: "none", disks: [{ path, format: "qcow2" }] });
      expect(await machine.monitor.execute("query-status")).toMatchObject({ status: "prelaunch" });
    }
    expect(await sha256OfDisk(path, "qcow2")).toBe(empty);
    {
      await using machine = await startMachine({ guest: "idle", disks: [{ path, format: "qcow2" }] });
      expect(await machine.monitor.execute("query-status")).toMatchObject({ status: "running" });
    }
    const sector = await toRaw(path, "qcow2", directory.file("a.raw"));
    await qemuIo(path, "qcow2", ["write -z 0 512"]);
    expect(await sha256OfDisk(path, "qcow2")).toBe(empty);
    expect(await compareImages(sector, path)).toContain("Content mismatch at offset 0");
  });

  it("gives disks the names, flags and controllers that were asked for", async () => {
    await using directory = await temporaryDirectory("tm,"); // commas end options of QEMU
    const image = async (name: string): Promise<string> => createImage(directory.file(name), "raw", MiB);
    await using machine = await startMachine({
      directory: directory.path,
      guest: "none",
      name: "web,1",
      uuid: "01234567-89ab-cdef-0123-456789abcdef",
      disks: [
        { path: await image("a"), format: "raw", id: null },
        { path: await image("b"), format: "raw", style: "drive", id: "data", driveId: "drv", serial: "S1" },
        { path: await image("c"), format: "raw", bus: "virtio-scsi", nodeName: "scsi-a" },
        { path: await image("d"), format: "raw", bus: "virtio-scsi", readOnly: true },
        { path: await image("e"), format: "raw", bus: "ide", style: "drive", cdrom: true },
        { path: await image("f"), format: "raw", bus: "sata", cdrom: true },
        { path: await image("g"), format: "raw", style: "drive", readOnly: true, iothread: true },
      ],
    });
    const { monitor } = machine;
    const devices = await monitor.execute<Record<string, unknown>[]>("query-block");
    const shown = devices.map((device) => {
      const inserted = device["inserted"] as Record<string, unknown>;
      return [device["device"], device["qdev"], device["removable"], inserted["ro"]].join(" ");
    });
    expect(shown.sort()).toEqual(
      [
        " /machine/peripheral-anon/device[0]/virtio-backend false false",
        "drv /machine/peripheral/data/virtio-backend false false",
        " vd2 false false",
        " vd3 false true",
        "drive4 vd4 true true",
        " vd5 true true",
        "drive6 /machine/peripheral/vd6/virtio-backend false true",
      ].sort(),
    );
    expect(devices.map((device) => (device["inserted"] as Record<string, unknown>)["node-name"])).toContain(
      "scsi-a",
    );
    expect(await monitor.execute("query-name")).toEqual({ name: "web,1" });
    expect(await monitor.execute("query-uuid")).toEqual({ UUID: "01234567-89ab-cdef-0123-456789abcdef" });
    const property = (path: string, name: string): Promise<unknown> =>
      monitor.execute("qom-get", { path: `/machine/peripheral/${path}`, property: name });
    expect(await property("data", "serial")).toBe("S1");
    expect(await property("vd6", "iothread")).toBe("/objects/io0");
    expect(await machine.qemuIo(0, "write -P 1 0 512")).toContain("wrote 512/512");
    await expect(machine.qemuIo(3, "write -P 1 0 512")).rejects.toThrow(/qemu-io -d .*vd3/);
  });

  it("tells what QEMU wrote when it does not start", async () => {
    await using directory = await temporaryDirectory();
    const disks = [{ path: directory.file("missing.raw"), format: "raw" as const }];
    await expect(startMachine({ guest: "none", disks })).rejects.toThrow(/QEMU ended.*missing\.raw/s);
  });

  it("leaves no QEMU behind when the test's process is killed", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.raw"), "raw", SIZE);
    const support = pathToFileURL(new URL("../support/qemu.ts", import.meta.url).pathname).href;
    const script = `
      const { startMachine } = await import(${JSON.stringify(support)});
      const machine = await startMachine({ directory: ${JSON.stringify(directory.path)},
        disks: [{ path: ${JSON.stringify(path)}, format: "raw" }] });
      console.log(machine.pid);
      setInterval(() => undefined, 1000);`;
    const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "-e", script], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    try {
      const [line] = (await once(createInterface(child.stdout), "line")) as [string];
      const pid = Number(line);
      expect(isQemu(pid)).toBe(true);
      child.kill("SIGKILL");
      const deadline = performance.now() + 5000;
      while (isQemu(pid) && performance.now() < deadline) await sleep(10);
      expect(isQemu(pid)).toBe(false);
    } finally {
      child.kill("SIGKILL");
    }
  });

  it("waitForGuestWriting() passes over what is read-only, follows anonymous disks, and does not pass for nothing", async () => {
    await using directory = await temporaryDirectory();
    const [a, b] = [directory.file("a.raw"), directory.file("b.raw")];
    for (const path of [a, b]) await createImage(path, "raw", SIZE);
    await using machine = await startMachine({
      guest: "counter",
      disks: [
        { path: a, format: "raw", id: null },
        { path: b, format: "raw", readOnly: true },
      ],
    });
    await machine.waitForGuestWriting(20);
    await machine.quit();
    expect(await readTrail(a)).toBeGreaterThanOrEqual(10);
    await using empty = await startMachine({ disks: [], guest: "none" });
    await expect(empty.waitForGuestWriting()).rejects.toThrow("no writable disk");
  });

  it("kills a machine at its deadline and says so", async () => {
    await using machine = await startMachine({ disks: [], guest: "none", deadline: 1500 });
    expect(await machine.exited).toEqual({ code: null, signal: "SIGKILL" });
    expect(machine.stderr).toContain("deadline of 1.5 s");
  });
});

describe("readTrail()", () => {
  it("finds a single block that is stale, zero or torn", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.raw"), "raw", SIZE);
    await using machine = await startMachine({ guest: "counter", disks: [{ path, format: "raw" }] });
    await machine.waitForGuestWriting(1200);
    await machine.quit();
    const counter = await readTrail(path);
    const block = (counter + 128) % 256;
    const offset = MiB + block * 64 * KiB;
    const damages = [
      { command: `write -z ${offset} 512`, problem: `block ${block} at ${offset} holds 0 instead of` },
      { command: `write -P 1 ${offset + 100} 4`, problem: `block at ${offset} is torn` },
    ];
    for (const { command, problem } of damages) {
      const damaged = await toRaw(path, "raw", directory.file("damaged.raw"));
      await qemuIo(damaged, "raw", [command]);
      await expect(readTrail(damaged)).rejects.toThrow(problem);
    }
    // What a missed cluster leaves: the block as it was a round ago.
    const file = await readFile(path);
    const stale = file.readUInt32LE(offset) - 256;
    for (let at = 0; at < 512; at += 4) file.writeUInt32LE(stale, offset + at);
    await writeFile(directory.file("stale.raw"), file);
    await expect(readTrail(directory.file("stale.raw"))).rejects.toThrow(
      `holds ${stale} instead of ${stale + 256}`,
    );
  });
});

describe("TestMachine", () => {
  it.each<{ bus: Bus; style: "drive" | "blockdev"; iothread?: boolean }>([
    { bus: "virtio-blk", style: "blockdev", iothread: true },
    { bus: "virtio-blk", style: "drive" },
    { bus: "virtio-scsi", style: "blockdev" },
    { bus: "ide", style: "blockdev" },
    { bus: "nvme", style: "blockdev" },
  ])("qemuIo() writes through the device of $bus, $style, and its bitmap sees it", async (kind) => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.qcow2"), "qcow2", SIZE);
    await using machine = await startMachine({
      guest: "none",
      disks: [{ path, format: "qcow2", nodeName: "d0", ...kind }],
    });
    await machine.monitor.execute("block-dirty-bitmap-add", { node: "d0", name: "b", granularity: 65536 });
    expect(await machine.qemuIo(0, "write -P 7 1M 64k")).toContain("wrote 65536/65536 bytes");
    const name = kind.style === "drive" ? "drive0" : "vd0";
    expect(await machine.qemuIo(name, "read -P 7 1M 64k")).toContain("read 65536/65536 bytes");
    await expect(machine.qemuIo(0, "read -P 8 1M 64k")).rejects.toThrow("Pattern verification failed");
    await expect(machine.qemuIo(0, "write 64M 64k")).rejects.toThrow(/failed|past end|Invalid/);
    await expect(machine.qemuIo("nowhere", "write 0 64k")).rejects.toThrow("nowhere");
    const nodes = await machine.monitor.execute<
      { "node-name": string; "dirty-bitmaps"?: { count: number }[] }[]
    >("query-named-block-nodes", { flat: true });
    const bitmaps = nodes.find((node) => node["node-name"] === "d0")?.["dirty-bitmaps"];
    expect(bitmaps).toMatchObject([{ name: "b", count: 65536 }]);
  });

  it("monitor.nextEvent() gives an event that its command caused, execute() QEMU's refusal", async () => {
    await using machine = await startMachine({ disks: [], monitors: 3 });
    expect(machine.qmpSockets).toHaveLength(2);
    const stopped = machine.monitor.nextEvent("STOP");
    await machine.monitor.execute("stop");
    expect(await stopped).toMatchObject({ event: "STOP" });
    await expect(machine.monitor.execute("block-job-cancel", { device: "x" })).rejects.toMatchObject({
      command: "block-job-cancel",
      errorClass: "DeviceNotActive",
    });
  });
});
