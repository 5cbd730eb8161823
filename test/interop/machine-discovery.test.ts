import { describe, expect, it } from "vitest";
import { UsageError } from "../../src/errors/index.js";
import { MachineBusyError, UnsupportedMachineError } from "../../src/machine/index.js";
import { createImage, type ImageFormat } from "../support/image.js";
import { startMachine, type Bus } from "../support/qemu.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";
import { startDaemon } from "./machine-daemon.js";
import { freezeRequest, NOTHING, openMachine, residueOf } from "./machine-fixture.js";

const MiB = 1024 * 1024;

describe("openLiveMachine()", () => {
  const buses: Bus[] = ["virtio-blk", "virtio-scsi", "ide", "sata", "nvme"];
  const table = buses.flatMap((bus) =>
    (["drive", "blockdev"] as const).flatMap((style) =>
      (["vd0", null] as const).map((id) => ({ bus, style, id })),
    ),
  );

  it.each(table)("finds a disk on $bus given by -$style with id $id", async ({ bus, style, id }) => {
    await using directory = await temporaryDirectory();
    const format: ImageFormat = id === null ? "raw" : "qcow2";
    const path = await createImage(directory.file("disk.img"), format, 4 * MiB + 512);
    await using vm = await startMachine({ disks: [{ path, format, bus, style, id }], guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const driveId = style === "drive" ? "drive0" : null;
    expect(machine.disks).toHaveLength(1);
    expect(machine.disks[0]).toMatchObject({
      name: id ?? driveId ?? "disk0",
      anonymous: id === null && driveId === null,
      deviceId: id,
      driveId,
      virtualSize: 4 * MiB + 512,
      format,
      imageFile: path,
      canPersist: format === "qcow2",
      iothread: null,
      bitmaps: [],
    });
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    await frozen.release(() => Promise.resolve());
    expect((await residueOf(vm.monitor)).checkpoints).toHaveLength(1);
  });

  it("passes over removable and read-only disks, and drives that no device uses", async () => {
    await using directory = await temporaryDirectory();
    const image = (name: string): Promise<string> => createImage(directory.file(name), "qcow2", MiB);
    await using vm = await startMachine({
      disks: [
        { path: await image("data"), format: "qcow2" },
        { path: await image("ro"), format: "qcow2", readOnly: true },
        { path: await image("cd"), format: "qcow2", bus: "ide", cdrom: true },
      ],
      extraArguments: [
        "-drive",
        `if=none,id=unused,file=${await image("unused")},format=qcow2`,
        "-device",
        "floppy,drive=fl",
        "-drive",
        `if=none,id=fl,file=${await createImage(directory.file("floppy"), "raw", 1440 * 1024)},format=raw`,
      ],
      guest: "none",
    });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    expect(machine.disks.map(({ name }) => name)).toEqual(["vd0"]);
  });

  it("finds firmware variables like any disk", async () => {
    await using directory = await temporaryDirectory();
    const code = await createImage(directory.file("code"), "raw", 4 * MiB);
    const vars = await createImage(directory.file("vars"), "raw", 256 * 1024);
    await using vm = await startMachine({
      disks: [{ path: await createImage(directory.file("disk"), "qcow2", MiB), format: "qcow2" }],
      extraArguments: [
        ...["-drive", `if=pflash,unit=0,readonly=on,format=raw,file=${code}`],
        ...["-drive", `if=pflash,unit=1,format=raw,file=${vars}`],
      ],
      guest: "none",
    });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    expect(machine.disks.map(({ name }) => name).sort()).toEqual(["pflash1", "vd0"]);
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    await frozen.release(() => Promise.resolve());
  });

  it("takes the format node below a throttle node of the user's", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("disk"), "qcow2", MiB);
    const node = `driver=qcow2,node-name=below,file.driver=file,file.filename=${path}`;
    await using vm = await startMachine({
      disks: [],
      guest: "none",
      extraArguments: [
        ...["-object", "throttle-group,id=tg", "-blockdev", node],
        ...["-blockdev", "driver=throttle,node-name=above,throttle-group=tg,file=below"],
        ...["-device", "virtio-blk-pci,drive=above,id=vd0"],
      ],
    });
    await using machine = await openMachine(vm.qmp, directory.file("run"), {
      select: [{ device: "above", name: "data" }],
    });
    expect(machine.disks[0]).toMatchObject({ name: "data", node: "below", format: "qcow2", imageFile: path });
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    await frozen.release(() => Promise.resolve());
  });

  it("tells who the machine is", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("disk"), "qcow2", MiB);
    const uuid = "6b9f0e0c-7f0e-4b52-9f0c-0c6a7ad1b0aa";
    await using vm = await startMachine({
      disks: [{ path, format: "qcow2", serial: "S1" }],
      guest: "idle",
      uuid,
      name: "web",
    });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    expect(machine.identity).toMatchObject({ name: "web", uuid, state: "running" });
    const { stdout } = await run("qemu-system-x86_64", ["--version"]);
    expect(stdout).toContain(machine.identity.qemuVersion.split(" ")[0]);
    expect(machine.identity.configuration).toMatchObject({
      architecture: "x86_64",
      memory: 32 * MiB,
      cpus: 1,
      disks: [{ device: "virtio-blk-device", serial: "S1", file: path }],
    });
    await vm.monitor.execute("stop");
    await machine.refresh();
    expect(machine.identity.state).toBe("paused");
  });

  it("selects by device id, drive id, node name or QOM path, and lists what there is", async () => {
    await using directory = await temporaryDirectory();
    const image = (name: string): Promise<string> => createImage(directory.file(name), "qcow2", MiB);
    await using vm = await startMachine({
      disks: [
        { path: await image("a"), format: "qcow2", id: "sys" },
        { path: await image("b"), format: "qcow2", style: "drive", driveId: "data" },
        { path: await image("c"), format: "qcow2", nodeName: "third", id: null },
      ],
      guest: "none",
    });
    const select = async (...devices: string[]): Promise<(string | null)[]> => {
      await using machine = await openMachine(vm.qmp, directory.file("run"), {
        select: devices.map((device) => ({ device })),
      });
      return machine.disks.map(({ name }) => name);
    };
    expect(await select("sys", "data")).toEqual(["vd1", "sys"].sort().reverse());
    expect(await select("third")).toEqual(["disk2"]);
    expect(await select("/machine/peripheral/sys/virtio-backend")).toEqual(["sys"]);
    await expect(select("nothing")).rejects.toThrow(UsageError);
    await expect(select("nothing")).rejects.toMatchObject({
      hint: expect.stringMatching(/sys.*third/) as string,
    });
    await expect(select("sys", "node0")).rejects.toThrow(/are the same disk/);
  });
});

describe("LiveMachine.assertReady()", () => {
  it("refuses a disk of another process by its name, unless others are selected", async () => {
    await using directory = await temporaryDirectory();
    const disk = await createImage(directory.file("a"), "qcow2", MiB);
    const shared = await createImage(directory.file("b"), "raw", MiB);
    const socket = directory.file("vhost.sock");
    await using daemon = await startDaemon([
      ...["--blockdev", `driver=file,node-name=f,filename=${shared}`],
      ...["--export", `vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path=${socket}`],
    ]);
    expect(daemon.pid).toBeGreaterThan(0);
    await using vm = await startMachine({
      disks: [{ path: disk, format: "qcow2" }],
      guest: "none",
      extraArguments: [
        ...["-object", "memory-backend-memfd,id=mem,size=32M,share=on", "-machine", "memory-backend=mem"],
        ...["-chardev", `socket,id=vu,path=${socket}`],
        ...["-device", "vhost-user-blk-pci,chardev=vu,id=outside"],
      ],
    });
    {
      await using machine = await openMachine(vm.qmp, directory.file("run"));
      await expect(machine.assertReady()).rejects.toThrow(UnsupportedMachineError);
      await expect(machine.assertReady()).rejects.toThrow(/disk outside: it is a vhost-user-blk-pci/);
    }
    await using machine = await openMachine(vm.qmp, directory.file("run"), { select: [{ device: "vd0" }] });
    await machine.assertReady();
  });

  it("refuses disks in iothreads, virtio-blk and virtio-scsi, unless allowed", async () => {
    for (const bus of ["virtio-blk", "virtio-scsi"] as const) {
      await using directory = await temporaryDirectory();
      const path = await createImage(directory.file("a"), "qcow2", MiB);
      await using vm = await startMachine({ disks: [{ path, format: "qcow2", bus, iothread: true }] });
      {
        await using machine = await openMachine(vm.qmp, directory.file("run"));
        expect(machine.disks[0]!.iothread).toBe("/objects/io0");
        await expect(machine.freeze(freezeRequest(machine.disks))).rejects.toThrow(UnsupportedMachineError);
        expect(await residueOf(vm.monitor)).toEqual(NOTHING);
      }
      await using machine = await openMachine(vm.qmp, directory.file("run"), { allowUnguarded: true });
      await machine.assertReady();
    }
  });

  it("finds the format node below another program's job, and refuses the disk until the job ends", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a"), "qcow2", MiB);
    const target = await createImage(directory.file("t"), "qcow2", MiB);
    await using vm = await startMachine({
      disks: [{ path, format: "qcow2", style: "drive" }],
      guest: "none",
    });
    const jobs: [string, Record<string, unknown>][] = [
      ["blockdev-backup", { sync: "none" }],
      ["blockdev-mirror", { sync: "none" }],
    ];
    for (const [command, options] of jobs) {
      await vm.monitor.execute("blockdev-add", {
        driver: "qcow2",
        "node-name": "t",
        file: { driver: "file", filename: target },
      });
      const done = vm.monitor.nextEvent("JOB_STATUS_CHANGE", (data) => data["status"] === "null");
      await vm.monitor.execute(command, { "job-id": "theirs", device: "drive0", target: "t", ...options });
      await using machine = await openMachine(vm.qmp, directory.file("run"));
      expect(machine.disks[0]).toMatchObject({ format: "qcow2", imageFile: path, foreignJobs: ["theirs"] });
      await expect(machine.freeze(freezeRequest(machine.disks))).rejects.toThrow(MachineBusyError);
      await vm.monitor.execute("block-job-cancel", { device: "theirs", force: true });
      await done;
      await machine.refresh();
      await machine.assertReady();
      await vm.monitor.execute("blockdev-del", { "node-name": "t" });
    }
  });

  it("refuses a machine that waits for its migration, or has been migrated", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a"), "qcow2", MiB);
    await using vm = await startMachine({ disks: [{ path, format: "qcow2" }], guest: "idle" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    await machine.assertReady();
    const away = vm.monitor.nextEvent("STOP");
    await vm.monitor.execute("migrate", { uri: `exec:cat > ${directory.file("state")}` });
    await away;
    await expect(machine.assertReady()).rejects.toThrow(/is migrating|has been migrated away/);
    await using arriving = await startMachine({
      disks: [{ path: await createImage(directory.file("b"), "qcow2", MiB), format: "qcow2" }],
      extraArguments: ["-incoming", "defer"],
      guest: "none",
    });
    await using other = await openMachine(arriving.qmp, directory.file("run"));
    await expect(other.assertReady()).rejects.toThrow(MachineBusyError);
  });
});
