import { once } from "node:events";
import { watch } from "node:fs";
import { mkdir, readdir, rm } from "node:fs/promises";
import { createServer, type Socket } from "node:net";
import { describe, expect, it } from "vitest";
import { createVariables, FirmwareShell } from "../support/firmware.js";
import { compareImages, toRaw, type ImageFormat } from "../support/image.js";
import type { Bus, TestDisk } from "../support/qemu.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";

const KiB = 1024;
const MiB = 1024 * KiB;

const namesOf = (point: PointView): string[] => point.disks.map(({ name }) => name);

/** By the disk's name: "incremental", or why it is compared, or full. */
function kindsOf(point: PointView): Record<string, string> {
  return Object.fromEntries(point.disks.map(({ name, kind, reason }) => [name, reason ?? kind]));
}

/** Every disk of a point, by its name, equals what the machine held: `images` says which image it was read from. */
async function expectRight(
  rig: Rig,
  point: PointView,
  images: Readonly<Record<string, string>>,
): Promise<void> {
  expect(namesOf(point).sort()).toEqual(Object.keys(images).sort());
  const identical = Object.fromEntries(Object.keys(images).map((name) => [name, "identical"]));
  expect(await rig.verify(point, images)).toEqual(identical);
}

/** A backup that must not come about. @returns exit code, message and hint */
async function refusal(rig: Rig, ...extra: string[]) {
  const result = await rig.run(rig.backupArguments(extra));
  // What is wrong with the command line itself is told on standard error.
  const error = result.stdout === "" ? result.json() : result.events().at(-1);
  const { message, hint } = error as { message?: string; hint?: string };
  return { code: result.code, message, hint };
}

/** All that a backup could leave: what the machine's block layer has, and the repository's points. */
async function traces(rig: Rig): Promise<unknown> {
  const { monitor } = rig.machine;
  const nodes = await monitor.execute<
    { "node-name": string; "dirty-bitmaps"?: { name: string; recording: boolean }[] }[]
  >("query-named-block-nodes", { flat: true });
  const [jobs, exports, status] = await Promise.all(
    ["query-jobs", "query-block-exports", "query-status"].map((command) => monitor.execute(command)),
  );
  return {
    nodes: nodes.map((node) => ({
      name: node["node-name"],
      bitmaps: (node["dirty-bitmaps"] ?? []).map(({ name, recording }) => ({ name, recording })),
    })),
    ...{ jobs, exports, status },
    repository: (await readdir(rig.repository, { recursive: true })).sort(),
  };
}

/** Takes connections at a socket and never reads from them: a migration to it stays where it is. */
async function stalledReceiver(path: string): Promise<AsyncDisposable> {
  const connections: Socket[] = [];
  const server = createServer({ pauseOnConnect: true }, (socket) => connections.push(socket)).listen(path);
  await once(server, "listening");
  return {
    async [Symbol.asyncDispose]() {
      for (const connection of connections) connection.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

const FIRST = "first backup of this disk";

describe("backup --disk", () => {
  interface Three {
    readonly rig: Rig;
    readonly a: string;
    readonly b: string;
    readonly c: string;
  }

  /** Device id `sys` on node `root`; drive id `data`, no device id; node `third`, no other name. */
  async function threeDisks(): Promise<Three> {
    const rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 2 * MiB);
    const b = await rig.image("b.raw", "raw", MiB + 512);
    const c = await rig.image("c.qcow2", "qcow2", 3 * MiB);
    await rig.start(
      [
        { path: a, format: "qcow2", id: "sys", nodeName: "root" },
        { path: b, format: "raw", style: "drive", driveId: "data", id: null },
        { path: c, format: "qcow2", nodeName: "third", id: null, bus: "virtio-scsi" },
      ],
      { guest: "none" },
    );
    await rig.machine.qemuIoAll("sys", ["write -P 1 0 1M"]);
    await rig.machine.qemuIoAll("data", ["write -P 2 0 1M"]);
    await rig.machine.qemuIoAll(2, ["write -P 3 0 2M"]);
    return { rig, a, b, c };
  }

  it("selects by device id, drive id, node name and qdev path, with and without a name; chains go on", async () => {
    const { rig, a, b, c } = await threeDisks();
    await using _ = rig;
    const select = (...disks: string[]): Promise<PointView> =>
      rig.backup(disks.flatMap((disk) => ["--disk", disk]));

    const first = await select("sys", "data=db", "third=logs");
    expect(kindsOf(first)).toEqual({ sys: FIRST, db: FIRST, logs: FIRST });
    await expectRight(rig, first, { sys: a, db: b, logs: c });

    // Called by other names, they are the same disks.
    const block =
      await rig.machine.monitor.execute<{ qdev?: string; inserted?: { file: string } }[]>("query-block");
    const pathOf = (image: string): string =>
      block.find(({ inserted }) => inserted?.file === image)?.qdev ?? "";
    expect(pathOf(a)).toBe("/machine/peripheral/sys/virtio-backend");
    expect(pathOf(b)).toMatch(/^\/machine\/peripheral-anon\/device\[\d+\]\/virtio-backend$/);
    for (const [disk, at] of [
      ["sys", 0],
      ["data", 0],
      [2, 0],
    ] as const) {
      await rig.machine.qemuIoAll(disk, [`write -P 4 ${at} 64k`]);
    }
    const second = await select("root=sys", `${pathOf(b)}=db`, `${pathOf(c)}=logs`);
    expect(kindsOf(second)).toEqual({ sys: "incremental", db: "incremental", logs: "incremental" });
    await expectRight(rig, second, { sys: a, db: b, logs: c });

    // The device's own path, without the part that QEMU makes below it; and the name can change.
    await rig.machine.qemuIoAll("sys", ["write -P 5 128k 64k"]);
    await rig.machine.qemuIoAll("data", ["write -P 5 128k 64k"]);
    const third = await select("/machine/peripheral/sys=system", pathOf(b).replace("/virtio-backend", ""));
    expect(kindsOf(third)).toEqual({ system: "incremental", data: "incremental" });
    await expectRight(rig, third, { system: a, data: b });
    expect(third.disks.map(({ token }) => token)).toEqual(first.disks.slice(0, 2).map(({ token }) => token));

    const fourth = await select("/machine/peripheral/sys/virtio-backend");
    expect(kindsOf(fourth)).toEqual({ sys: "incremental" });
    await expectRight(rig, fourth, { sys: a });
  });

  it("takes a SCSI disk by the path of its device, too", async () => {
    await using rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", MiB);
    const b = await rig.image("b.qcow2", "qcow2", MiB);
    await rig.start(
      [
        { path: a, format: "qcow2", id: "sda", bus: "virtio-scsi" },
        { path: b, format: "qcow2", id: "hda", bus: "ide" },
      ],
      { guest: "none" },
    );
    await rig.machine.qemuIo("hda", "write -P 1 0 1M");
    const point = await rig.backup(["--disk", "/machine/peripheral/hda=ide"]);
    await expectRight(rig, point, { ide: b });
  });

  it.each([
    [["nothing"], /no disk "nothing"/, /^Its disks: data = #block\d+, sys = root, third = /],
    [["sys", "sys"], /"sys" and "sys" are the same disk/, undefined],
    [
      ["data", "sys=a", "/machine/peripheral/sys=b"],
      /"sys" and "\/machine\/peripheral\/sys" are the same/,
      undefined,
    ],
    [["sys=a", "data=a"], /Two disks would have the name "a"/, /--disk DEVICE=NAME/],
    [["sys=../up"], /cannot be the name of a disk/, undefined],
    [["=a"], /DEVICE=NAME/, undefined],
  ])("refuses %j, says why, and changes nothing", async (disks, message, hint) => {
    const { rig } = await threeDisks();
    await using _ = rig;
    const before = await traces(rig);
    const refused = await refusal(rig, ...disks.flatMap((disk) => ["--disk", disk]));
    expect(refused.code).toBe(2);
    expect(refused.message).toMatch(message);
    if (hint !== undefined) expect(refused.hint).toMatch(hint);
    expect(await traces(rig)).toEqual(before);
  });
});

describe("backup of firmware variables", () => {
  it.each(["qcow2", "raw"] as const)(
    "what the firmware stored is there when a machine starts with the restored flash (%s)",
    async (format) => {
      await using rig = await Rig.create();
      const disk = await rig.image("disk.qcow2", "qcow2", MiB);
      let boots = 0;
      /** Starts a machine with these variables. */
      const boot = async (variables: string): Promise<FirmwareShell> => {
        boots += 1;
        const socket = rig.directory.file(`serial${boots}`);
        const shell = await FirmwareShell.listen(socket, variables, format);
        await rig.start([{ path: disk, format: "qcow2", id: "vda" }], {
          extraArguments: shell.machineArguments,
          deadline: 200_000,
        });
        await shell.start(() => rig.machine.monitor.execute("system_reset"));
        return shell;
      };

      const lost = await createVariables(rig.directory.file("nvram"), format);
      const points: PointView[] = [];
      {
        await using shell = await boot(lost);
        expect(await shell.variable("first")).toBeUndefined();
        await shell.setVariable("first", "cafe01");
        points.push(await rig.backup());
        await shell.setVariable("second", "beef0203");
        await shell.setVariable("first", "cafe02");
        points.push(await rig.backup());
      }
      const [full, increment] = points as [PointView, PointView];
      const name = namesOf(full).find((one) => one !== "vda") ?? "";
      expect(kindsOf(full)[name]).toBe(FIRST);
      expect(kindsOf(increment)[name]).toBe("incremental");
      for (const point of points) await expectRight(rig, point, { vda: disk, [name]: lost });
      await rig.machine.kill();
      await rm(lost);

      const restored = async (point: PointView): Promise<FirmwareShell> => {
        const target = rig.directory.file(`restored.${point.id}`);
        const to = ["--disk", name, "--to", target, "--format", format];
        await rig.tidemark(["restore", `vm@${point.id}`, "--repo", rig.repository, ...to]);
        return await boot(target);
      };
      {
        await using shell = await restored(full);
        expect(await shell.variable("first")).toBe("cafe01");
        expect(await shell.variable("second")).toBeUndefined();
      }
      await using shell = await restored(increment);
      expect(await shell.variable("first")).toBe("cafe02");
      expect(await shell.variable("second")).toBe("beef0203");
    },
    240_000,
  );
});

describe("backup of devices of all kinds", () => {
  it("follows disks on functions of one slot, and disks that are plugged and unplugged", async () => {
    await using rig = await Rig.create();
    const [f0, f1, hot, scsi] = (await Promise.all(
      ["f0", "f1", "hot", "scsi"].map((name) => rig.image(`${name}.qcow2`, "qcow2", 2 * MiB)),
    )) as [string, string, string, string];
    const blockdev = (node: string, filename: string) => ({
      driver: "qcow2",
      "node-name": node,
      discard: "unmap",
      file: { driver: "file", filename },
    });
    await rig.start([], {
      guest: "none",
      extraArguments: [
        ...["-blockdev", JSON.stringify(blockdev("n0", f0)), "-blockdev", JSON.stringify(blockdev("n1", f1))],
        ...["-device", "virtio-blk-pci,id=f0,drive=n0,addr=5.0,multifunction=on"],
        ...["-device", "virtio-blk-pci,id=f1,drive=n1,addr=5.1"],
        ...["-device", "virtio-scsi-pci,id=bus,addr=6"],
      ],
    });
    const { monitor } = rig.machine;
    const virtio = (id: string): string => `-d /machine/peripheral/${id}/virtio-backend`;
    const plug = async (node: string, file: string, driver: string, id: string, place: object) => {
      await monitor.execute("blockdev-add", blockdev(node, file));
      await monitor.execute("device_add", { driver, id, drive: node, ...place });
    };
    const unplug = async (id: string, node: string, finish = () => Promise.resolve<unknown>(undefined)) => {
      const gone = monitor.nextEvent("DEVICE_DELETED", (data) => data["device"] === id);
      await monitor.execute("device_del", { id });
      await finish();
      await gone;
      await monitor.execute("blockdev-del", { "node-name": node });
    };

    await plug("n2", hot, "virtio-blk-pci", "hot", { addr: "7" });
    await rig.machine.qemuIo(virtio("f0"), "write -P 1 0 1M");
    await rig.machine.qemuIo(virtio("f1"), "write -P 2 0 1M");
    await rig.machine.qemuIo(virtio("hot"), "write -P 3 0 1M");
    const first = await rig.backup();
    expect(kindsOf(first)).toEqual({ f0: FIRST, f1: FIRST, hot: FIRST });

    await plug("n3", scsi, "scsi-hd", "sda", { bus: "bus.0" });
    await rig.machine.qemuIo(virtio("f1"), "write -P 4 64k 1000");
    await rig.machine.qemuIo(virtio("hot"), "write -P 5 128k 1000");
    await rig.machine.qemuIo("-d sda", "write -P 6 0 1M");
    const second = await rig.backup();
    expect(kindsOf(second)).toEqual({ f0: "incremental", f1: "incremental", hot: "incremental", sda: FIRST });

    // A SCSI disk goes at once; a PCI device of a guest that does not answer goes with the next reset.
    await rig.machine.qemuIo("-d sda", "write -P 7 64k 1000");
    await rig.machine.qemuIo(virtio("hot"), "write -P 8 192k 1000");
    await unplug("sda", "n3");
    await unplug("hot", "n2", () => monitor.execute("system_reset"));
    await rig.machine.qemuIo(virtio("f0"), "write -P 9 256k 1000");
    const third = await rig.backup();
    expect(kindsOf(third)).toEqual({ f0: "incremental", f1: "incremental" });

    // They come back, in each other's place, and go on with their own chains.
    await plug("n4", scsi, "virtio-blk-pci", "hot2", { addr: "7" });
    await plug("n5", hot, "scsi-hd", "sdb", { bus: "bus.0" });
    await rig.machine.qemuIo(virtio("hot2"), "write -P 10 320k 1000");
    const fourth = await rig.backup();
    const incremental = "incremental";
    expect(kindsOf(fourth)).toEqual({
      f0: incremental,
      f1: incremental,
      hot2: incremental,
      sdb: incremental,
    });
    expect(
      fourth.disks
        .filter(({ parent }) => parent === second.id)
        .map(({ name }) => name)
        .sort(),
    ).toEqual(["hot2", "sdb"]);

    await expectRight(rig, first, { f0, f1, hot });
    await expectRight(rig, second, { f0, f1, hot, sda: scsi });
    await expectRight(rig, third, { f0, f1 });
    await expectRight(rig, fourth, { f0, f1, hot2: scsi, sdb: hot });
  });

  it("backs up a machine with 12 disks on five buses", async () => {
    await using rig = await Rig.create();
    const buses: Bus[] = ["virtio-blk", "virtio-scsi", "ide", "sata", "nvme"];
    const disks: TestDisk[] = [];
    for (let number = 0; number < 12; number += 1) {
      const format: ImageFormat = number % 3 === 1 ? "raw" : "qcow2";
      const path = await rig.image(`${number}.${format}`, format, MiB + number * 64 * KiB + 512);
      const bus = buses[number % buses.length] ?? "ide";
      disks.push({ path, format, bus, style: number % 2 === 0 ? "blockdev" : "drive" });
    }
    const images = Object.fromEntries(disks.map(({ path }, number) => [`vd${number}`, path]));
    await rig.start(disks, { guest: "none" });
    for (const number of disks.keys()) {
      await rig.machine.qemuIo(number, `write -P ${number + 1} ${number * 64 * KiB} 200k`);
    }
    const full = await rig.backup();
    expect(full.disks.map(({ kind }) => kind)).toEqual(disks.map(() => "full"));
    for (const number of [0, 3, 4, 7, 11]) {
      await rig.machine.qemuIo(number, `write -P ${number + 100} ${number * 64 * KiB + 4096} 512`);
    }
    const increment = await rig.backup();
    expect(increment.disks.map(({ kind }) => kind)).toEqual(disks.map(() => "incremental"));
    const changed = increment.disks.filter(({ dataClusters }) => dataClusters > 0).map(({ name }) => name);
    expect(changed.sort()).toEqual(["vd0", "vd11", "vd3", "vd4", "vd7"]);
    await expectRight(rig, full, images);
    await expectRight(rig, increment, images);
  });
});

describe("backup over QMP on TCP", () => {
  it("serves the frozen point from the directory for temporary files, or the one given, and leaves it empty", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.qcow2", "qcow2", 2 * MiB);
    await rig.start([{ path: image, format: "qcow2", id: "vda" }], {
      guest: "none",
      extraArguments: [
        "-chardev",
        "socket,id=tcp,host=127.0.0.1,port=0,server=on,wait=off",
        "-mon",
        "chardev=tcp,mode=control",
      ],
    });
    const chardevs =
      await rig.machine.monitor.execute<{ label: string; filename: string }[]>("query-chardev");
    const tcp = chardevs.find(({ label }) => label === "tcp")?.filename ?? "";
    const [, port] = /tcp:127\.0\.0\.1:(\d+)/.exec(tcp) ?? [];
    expect(Number(port)).toBeGreaterThan(0);

    const temporary = rig.directory.file("tmp");
    const given = rig.directory.file("sockets");
    await mkdir(temporary);
    await mkdir(given);
    for (const [round, place] of [temporary, given].entries()) {
      await rig.machine.qemuIoAll("vda", [`write -P ${round + 1} ${round * 64}k 100k`, "flush"]);
      // No proxy stands before this monitor; nothing writes while the backup runs.
      const held = await toRaw(image, "qcow2", rig.directory.file(`held${round}`), { live: true });
      const seen = new Set<string>();
      const watchers = [temporary, given].map((directory) =>
        watch(directory, (_event, name) => void seen.add(`${directory}/${(name ?? "").split("-")[0] ?? ""}`)),
      );
      const result = await rig.tidemark(
        [
          ...[
            "backup",
            "--machine",
            "vm",
            "--repo",
            rig.repository,
            "--json",
            "--qmp",
            `tcp:127.0.0.1:${port ?? ""}`,
          ],
          ...(place === given ? ["--socket-dir", given] : []),
        ],
        { env: { TMPDIR: temporary } },
      );
      for (const watcher of watchers) watcher.close();
      const point = pointOf(result.events());
      expect(point.disks[0]?.kind).toBe(round === 0 ? "full" : "incremental");
      expect([...seen]).toEqual([`${place}/tm`]);
      expect(await readdir(temporary)).toEqual([]);
      expect(await readdir(given)).toEqual([]);
      const restored = await rig.restore(point);
      expect(
        await compareImages({ path: `${restored}/vda.raw`, format: "raw" }, { path: held, format: "raw" }),
      ).toBe("identical");
    }
  });
});

describe("backup of a machine in each state", () => {
  it("takes one that is not started yet, runs, or is paused, and leaves it in that state", async () => {
    await using rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 20 * MiB);
    const b = await rig.image("b.raw", "raw", 20 * MiB);
    const machine = await rig.start(
      [
        { path: a, format: "qcow2", id: "vda" },
        { path: b, format: "raw", id: "vdb" },
      ],
      { guest: "counter", extraArguments: ["-S"] },
    );
    const points: PointView[] = [];
    const backUpIn = async (status: string, recorded: string): Promise<void> => {
      expect(await machine.monitor.execute("query-status")).toMatchObject({ status });
      const point = await rig.backup();
      expect(point.state).toBe(recorded);
      expect(await machine.monitor.execute("query-status")).toMatchObject({ status });
      points.push(point);
    };
    await backUpIn("prelaunch", "paused");
    await machine.monitor.execute("cont");
    await machine.waitForGuestWriting(8);
    await backUpIn("running", "running");
    await machine.waitForGuestWriting(8);
    await machine.monitor.execute("stop");
    // The proxy stops the machine for its reference, so what it shows of a paused one is "paused" all the same.
    await backUpIn("paused", "paused");
    await machine.monitor.execute("cont");
    await machine.waitForGuestWriting(8);
    await backUpIn("running", "running");
    expect(points.slice(1).flatMap(({ disks }) => disks.map(({ kind }) => kind))).toEqual(
      Array.from({ length: 6 }, () => "incremental"),
    );
    for (const point of points) await expectRight(rig, point, { vda: a, vdb: b });
  });
});

describe("backup and migration", () => {
  interface Migrating {
    readonly rig: Rig;
    readonly a: string;
    readonly b: string;
    readonly disks: readonly TestDisk[];
    /** Where the machine's state goes. */
    readonly state: string;
  }

  /** A machine that writes to its disks, and has a point. */
  async function machineWithPoint(): Promise<Migrating & { readonly first: PointView }> {
    const rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 20 * MiB);
    const b = await rig.image("b.raw", "raw", 20 * MiB);
    const disks: TestDisk[] = [
      { path: a, format: "qcow2", id: "vda" },
      { path: b, format: "raw", id: "vdb" },
    ];
    await rig.start(disks, { guest: "counter" });
    await rig.machine.waitForGuestWriting(8);
    const first = await rig.backup();
    await rig.machine.waitForGuestWriting(8);
    return { rig, a, b, disks, state: rig.directory.file("state"), first };
  }

  /** Waits for a state of the migration, which QEMU then tells. */
  const nextMigration = async (rig: Rig, status: string): Promise<void> => {
    await rig.machine.monitor.nextEvent("MIGRATION", (data) => data["status"] === status);
  };

  async function tellMigration(rig: Rig): Promise<void> {
    const capabilities = [{ capability: "events", state: true }];
    await rig.machine.monitor.execute("migrate-set-capabilities", { capabilities });
  }

  /** Waits until the machine has left. The last step comes after QEMU's last event. */
  async function untilAway(rig: Rig): Promise<void> {
    for (let tries = 0; tries < 1000; tries += 1) {
      const { status } = await rig.machine.monitor.execute<{ status: string }>("query-status");
      if (status === "postmigrate") return;
      expect(status).toBe("finish-migrate");
    }
    throw new Error("The migration does not end");
  }

  it("refuses a machine that migrates, with nothing changed, and goes on when that was cancelled", async () => {
    const { rig, a, b, state, first } = await machineWithPoint();
    await using _ = rig;
    const { monitor } = rig.machine;
    // The base of the second point stays: something that the next run would tidy up.
    const hook = rig.proxy.onCommand("transaction", ({ arguments: given }) =>
      JSON.stringify(given).includes("bitmap-remove") ? { error: "injected" } : undefined,
    );
    const second = await rig.backup();
    expect(hook.fired).toBeGreaterThan(0);
    hook.remove();

    await tellMigration(rig);
    await using _receiver = await stalledReceiver(state);
    const active = nextMigration(rig, "active");
    await monitor.execute("migrate", { uri: `unix:${state}` });
    await active;
    const before = await traces(rig);
    const refused = await refusal(rig);
    expect(refused).toMatchObject({ code: 5, message: expect.stringContaining("it is migrating") as string });
    expect(await traces(rig)).toEqual(before);
    expect(JSON.stringify(before)).toContain(first.id);
    expect(await monitor.execute("query-migrate")).toMatchObject({ status: "active" });

    const cancelled = nextMigration(rig, "cancelled");
    await monitor.execute("migrate_cancel");
    await cancelled;
    await rig.machine.waitForGuestWriting(8);
    const third = await rig.backup();
    expect(kindsOf(third)).toEqual({ vda: "incremental", vdb: "incremental" });
    expect(JSON.stringify(await traces(rig))).not.toContain(`${first.id}-`);
    for (const point of [first, second, third]) await expectRight(rig, point, { vda: a, vdb: b });
  });

  it("refuses a machine that has left, and one that has not arrived; backs it up where it runs then", async () => {
    const { rig, a, b, disks, state, first } = await machineWithPoint();
    await using _ = rig;
    await tellMigration(rig);
    const completed = nextMigration(rig, "completed");
    await rig.machine.monitor.execute("migrate", { uri: `exec:cat > ${state}` });
    await completed;
    await untilAway(rig);
    const left = await traces(rig);
    const refused = await refusal(rig);
    expect(refused).toMatchObject({
      code: 5,
      message: expect.stringContaining("it has been migrated away") as string,
      hint: expect.stringContaining("where it runs now") as string,
    });
    expect(await traces(rig)).toEqual(left);

    await rig.start(disks, { guest: "counter", extraArguments: ["-incoming", "defer"] });
    const waiting = await traces(rig);
    const early = await refusal(rig);
    expect(early).toMatchObject({ code: 5, message: expect.stringContaining("it is migrating") as string });
    expect(await traces(rig)).toEqual(waiting);

    const arrived = rig.machine.monitor.nextEvent("RESUME");
    await rig.machine.monitor.execute("migrate-incoming", { uri: `exec:cat ${state}` });
    await arrived;
    await rig.machine.waitForGuestWriting(8);
    expect(await rig.machine.monitor.execute("query-migrate")).toMatchObject({ status: "completed" });
    const second = await rig.backup();
    expect(kindsOf(second)).toEqual({
      vda: "incremental",
      vdb: "compared: checkpoint bitmap missing (raw disk, QEMU restarted)",
    });
    await rig.machine.waitForGuestWriting(8);
    const third = await rig.backup();
    expect(kindsOf(third)).toEqual({ vda: "incremental", vdb: "incremental" });
    for (const point of [first, second, third]) await expectRight(rig, point, { vda: a, vdb: b });
  });

  it("goes on with a machine that was saved to a file and continued; what no image stores is compared", async () => {
    const { rig, a, b, state, first } = await machineWithPoint();
    await using _ = rig;
    await tellMigration(rig);
    const completed = nextMigration(rig, "completed");
    await rig.machine.monitor.execute("migrate", { uri: `exec:cat > ${state}` });
    await completed;
    await untilAway(rig);
    await rig.machine.monitor.execute("cont");
    await rig.machine.waitForGuestWriting(8);
    const second = await rig.backup();
    expect(kindsOf(second)).toEqual({
      vda: "incremental",
      vdb: "compared: machine was migrated away and came back (raw disk: its bitmap knows nothing of that time)",
    });
    for (const point of [first, second]) await expectRight(rig, point, { vda: a, vdb: b });
  });
});
