import { readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { SnapshotLostError } from "../../src/machine/index.js";
import { QmpClosedError } from "../../src/qmp/index.js";
import { compareImages, createImage } from "../support/image.js";
import { startMachine } from "../support/qemu.js";
import { QmpProxy } from "../support/qmp-proxy.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import {
  basesOf,
  copyFrozen,
  dirtyClusters,
  filesOfOurs,
  freezeRequest,
  NOTHING,
  openMachine,
  residueOf,
} from "./machine-fixture.js";

const MiB = 1024 * 1024;

async function twoDisks(directory: TemporaryDirectory): Promise<{ path: string; format: "qcow2" | "raw" }[]> {
  return [
    { path: await createImage(directory.file("a.qcow2"), "qcow2", 32 * MiB), format: "qcow2" },
    { path: await createImage(directory.file("b.raw"), "raw", 32 * MiB), format: "raw" },
  ];
}

const noConnections = (): Promise<void> => Promise.resolve();

describe("LiveMachine.freeze()", () => {
  it("serves what qcow2 and raw disks held at the freeze, while the guest writes on", async () => {
    await using directory = await temporaryDirectory();
    const disks = await twoDisks(directory);
    await using vm = await startMachine({ disks, guest: "counter" });
    await using proxy = await QmpProxy.start(vm.qmp, { directory: directory.file("references") });
    await using machine = await openMachine(proxy.socket, directory.file("run"));
    await vm.waitForGuestWriting();

    let bases: ReturnType<typeof basesOf> | undefined;
    for (const round of ["full", "increment", "increment again"]) {
      const request = freezeRequest(machine.disks, bases === undefined ? {} : { bases });
      const frozen = await machine.freeze(request);
      await vm.waitForGuestWriting(20);
      for (const [index, disk] of frozen.disks.entries()) {
        const reference = proxy.referenceOf(disks[index]!.path);
        const copy = await copyFrozen(disk, directory.file("copy.raw"));
        expect(await compareImages({ path: copy, format: "raw" }, { path: reference, format: "raw" })).toBe(
          "identical",
        );
        if (round !== "full") expect((await dirtyClusters(disk)).size).toBeGreaterThan(0);
      }
      await frozen.assertIntact();
      await frozen.release(noConnections);
      await frozen.keep();
      bases = basesOf(frozen.disks);
      expect(await residueOf(vm.monitor)).toEqual({
        ...NOTHING,
        checkpoints: frozen.disks.map(({ bitmap }) => bitmap).sort(),
      });
    }
    await machine.close();
    expect(await filesOfOurs(directory.path, proxy.socket.slice(0, -"/qmp.sock".length))).toEqual([]);
  });

  it("sends the actions of the freeze in the order that loses nothing", async () => {
    await using directory = await temporaryDirectory();
    const disks = await twoDisks(directory);
    await using vm = await startMachine({ disks, guest: "none" });
    await using proxy = await QmpProxy.start(vm.qmp);
    await using machine = await openMachine(proxy.socket, directory.file("run"));
    const first = await machine.freeze(freezeRequest(machine.disks));
    await first.release(noConnections);
    await first.keep();
    const second = await machine.freeze(freezeRequest(machine.disks, { bases: basesOf(first.disks) }));
    await second.release(noConnections);

    const transactions = proxy.commands.filter(({ name }) => name === "transaction");
    const actions = transactions.map((command) =>
      (command.arguments["actions"] as { type: string }[]).map(({ type }) => type),
    );
    expect(actions).toContainEqual([
      ...["block-dirty-bitmap-add", "block-dirty-bitmap-add"],
      ...["blockdev-backup", "blockdev-backup"],
      ...["block-dirty-bitmap-add", "block-dirty-bitmap-merge"],
      ...["block-dirty-bitmap-add", "block-dirty-bitmap-merge"],
    ]);
    const teardown = proxy.commands.map(({ name }) => name).slice(-40);
    const order = ["block-export-del", "nbd-server-stop", "job-cancel", "job-dismiss", "blockdev-del"];
    const places = order.map((name) => teardown.lastIndexOf(name));
    expect(places).toEqual([...places].sort((a, b) => a - b));
  });

  it("drops everything but the base after a failure, the checkpoint too if nothing can have been committed", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const first = await machine.freeze(freezeRequest(machine.disks));
    await first.release(noConnections);
    await first.keep();
    const failed = await machine.freeze(freezeRequest(machine.disks, { bases: basesOf(first.disks) }));
    await failed.release(noConnections);
    await failed.drop({ keepCheckpoint: true });
    expect(await residueOf(vm.monitor)).toEqual({
      ...NOTHING,
      checkpoints: [...first.disks, ...failed.disks].map(({ bitmap }) => bitmap).sort(),
    });
    await failed.drop();
    expect(await residueOf(vm.monitor)).toEqual({
      ...NOTHING,
      checkpoints: first.disks.map(({ bitmap }) => bitmap).sort(),
    });
  });

  it("refuses a disk whose image is no longer the one that its guest writes to", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    // Somebody takes a snapshot between the look at the disks and the freeze: what was looked at is the past now.
    await vm.monitor.execute("blockdev-snapshot-sync", {
      "node-name": machine.disks[0]!.node,
      "snapshot-node-name": "overlay",
      "snapshot-file": directory.file("overlay.qcow2"),
      format: "qcow2",
    });
    await expect(machine.freeze(freezeRequest(machine.disks))).rejects.toThrow(
      expect.objectContaining({
        name: "MachineBusyError",
        message: expect.stringContaining("vd0") as string,
      }),
    );
    expect(await residueOf(vm.monitor)).toEqual(NOTHING);

    await machine.refresh();
    const [{ node }] = machine.disks as [(typeof machine.disks)[number]];
    const attempts = async (): Promise<void> => {
      const snapshot = {
        "node-name": node,
        "snapshot-node-name": "next",
        "snapshot-file": directory.file("c"),
      };
      await expect(vm.monitor.execute("blockdev-snapshot-sync", snapshot)).rejects.toThrow("is used as");
      const size = { "node-name": node, size: 64 * MiB };
      await expect(vm.monitor.execute("block_resize", size)).rejects.toThrow("in use");
    };
    // From the last look on QEMU itself keeps the disk as it is.
    const frozen = await machine.freeze(freezeRequest(machine.disks, { beforeFreeze: attempts }));
    await frozen.release(noConnections);
  });

  it("refuses a base that stopped to record", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const first = await machine.freeze(freezeRequest(machine.disks));
    await first.release(noConnections);
    const [{ disk, bitmap }] = first.disks as [(typeof first.disks)[number]];
    await vm.monitor.execute("block-dirty-bitmap-disable", { node: disk.node, name: bitmap });
    const request = freezeRequest(machine.disks, { bases: basesOf(first.disks) });
    await expect(machine.freeze(request)).rejects.toThrow("does not record");
  });

  it("leaves nothing when the transaction or an export is refused", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using proxy = await QmpProxy.start(vm.qmp);
    await using machine = await openMachine(proxy.socket, directory.file("run"));
    for (const command of ["transaction", "block-export-add", "block-set-write-threshold", "blockdev-add"]) {
      const hook = proxy.onCommand(command, () =>
        hook.fired === 2 || command === "transaction" ? { error: `no ${command}` } : undefined,
      );
      await expect(machine.freeze(freezeRequest(machine.disks))).rejects.toThrow(`no ${command}`);
      hook.remove();
      expect(await residueOf(vm.monitor)).toEqual(NOTHING);
      expect((await readdir(directory.path)).sort()).toEqual(["a.qcow2", "b.raw", "run"]);
    }
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    await frozen.release(noConnections);
  });

  it("undoes a freeze that is aborted, and rethrows the reason", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using proxy = await QmpProxy.start(vm.qmp);
    await using machine = await openMachine(proxy.socket, directory.file("run"));
    for (const command of ["blockdev-create", "transaction", "block-export-add"]) {
      const controller = new AbortController();
      const reason = new Error(`stop at ${command}`);
      const hook = proxy.onCommand(command, () => {
        controller.abort(reason);
        return undefined;
      });
      await expect(machine.freeze(freezeRequest(machine.disks), { signal: controller.signal })).rejects.toBe(
        reason,
      );
      expect(hook.fired).toBeGreaterThan(0);
      hook.remove();
      expect(await residueOf(vm.monitor)).toEqual(NOTHING);
    }
  });
});

describe("FreezeRequest.beforeFreeze", () => {
  it("sees scratch and socket that strangers cannot open, and its failure leaves nothing", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const modes: string[] = [];
    const look = async (): Promise<void> => {
      for (const place of [directory.path, vm.directory]) {
        const names = (await readdir(place)).filter((name) => name.startsWith("tm-"));
        for (const name of names) modes.push(((await stat(join(place, name))).mode & 0o777).toString(8));
      }
      throw new Error("the guest does not freeze");
    };
    const request = freezeRequest(machine.disks, { beforeFreeze: look });
    await expect(machine.freeze(request)).rejects.toThrow("the guest does not freeze");
    expect(modes).toEqual(["600", "600", "700"]);
    expect(await residueOf(vm.monitor)).toEqual(NOTHING);
    expect(await filesOfOurs(directory.path, vm.directory)).toEqual([`run/${machine.runId ?? ""}.json`]);
  });

  it("ends with QEMU's end, and no file is left, when QEMU dies in the middle", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    const machine = await openMachine(vm.qmp, directory.file("run"));
    const request = freezeRequest(machine.disks, { beforeFreeze: () => vm.kill().then(() => undefined) });
    await expect(machine.freeze(request)).rejects.toThrow(QmpClosedError);
    await machine.close();
    expect(await filesOfOurs(directory.path, vm.directory)).toEqual([]);
  });

  it("calls onFrozen once the point is frozen, and undoes the freeze when that fails", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    let jobs: readonly string[] = [];
    const onFrozen = async (): Promise<void> => {
      ({ jobs } = await residueOf(vm.monitor));
      throw new Error("the guest does not thaw");
    };
    await expect(machine.freeze(freezeRequest(machine.disks, { onFrozen }))).rejects.toThrow("does not thaw");
    expect(jobs).toHaveLength(2);
    expect(await residueOf(vm.monitor)).toEqual(NOTHING);
  });
});

describe("FrozenPoint.assertIntact()", () => {
  it("names the disk whose job somebody cancelled, and fires `failed`", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    await frozen.assertIntact();
    const jobs = await vm.monitor.execute<{ id: string }[]>("query-jobs");
    const fired = new Promise((resolve) =>
      frozen.failed.addEventListener("abort", () => resolve(frozen.failed.reason)),
    );
    await vm.monitor.execute("job-cancel", { id: jobs.find(({ id }) => id.includes("-1-"))!.id });
    expect(await fired).toBeInstanceOf(SnapshotLostError);
    await expect(frozen.assertIntact()).rejects.toThrow(/disk vd1: it is lost/);
    await frozen.release(noConnections);
    expect((await residueOf(vm.monitor)).jobs).toEqual([]);
  });
});

describe("FrozenPoint.release()", () => {
  it("deletes exports before it closes connections, and does nothing the second time", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    const exportsAtClose: (readonly string[])[] = [];
    const close = async (): Promise<void> => {
      exportsAtClose.push((await residueOf(vm.monitor)).exports);
    };
    await Promise.all([frozen.release(close), frozen.release(close)]);
    await frozen.release(close);
    expect(exportsAtClose).toEqual([[]]);
  });

  it("ends connections and files when QEMU has died", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startMachine({ disks: await twoDisks(directory), guest: "none" });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const frozen = await machine.freeze(freezeRequest(machine.disks));
    await vm.kill();
    let closed = 0;
    await frozen.release(() => {
      closed += 1;
      return Promise.resolve();
    });
    expect(closed).toBe(1);
    expect(frozen.failed.aborted).toBe(true);
    await machine.close();
    expect(await filesOfOurs(directory.path)).toEqual([]);
  });
});
