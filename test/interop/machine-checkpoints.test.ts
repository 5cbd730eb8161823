import { once } from "node:events";
import { describe, expect, it } from "vitest";
import {
  bitmapsToRemove,
  chooseBase,
  chooseBases,
  ScratchFullError,
  type BaseContext,
  type CataloguePoint,
  type FrozenPoint,
  type LiveMachine,
} from "../../src/machine/index.js";
import { parseBitmapName } from "../../src/point/index.js";
import { createImage } from "../support/image.js";
import { startMachine, type TestDisk, type TestMachine } from "../support/qemu.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";
import {
  basesOf,
  CLUSTER,
  dirtyClusters,
  freezeRequest,
  NOTHING,
  openMachine,
  REPOSITORY,
  residueOf,
} from "./machine-fixture.js";

const MiB = 1024 * 1024;
const noConnections = (): Promise<void> => Promise.resolve();

function pointOf(frozen: FrozenPoint): CataloguePoint {
  return {
    id: parseBitmapName(frozen.disks[0]!.bitmap)!.checkpoint,
    machine: { uuid: null },
    disks: frozen.disks.map(({ disk, token, virtualSize }) => ({
      name: disk.name,
      token,
      virtualSize,
      clusterSize: CLUSTER,
    })),
  };
}

function contextOf(...points: CataloguePoint[]): BaseContext {
  return {
    repositoryTag: REPOSITORY,
    clusterSize: CLUSTER,
    catalogue: (id) => Promise.resolve(points.find((point) => point.id === id)),
    machineUuid: null,
    points,
  };
}

async function commit(machine: LiveMachine, bases?: ReturnType<typeof basesOf>): Promise<FrozenPoint> {
  const frozen = await machine.freeze(freezeRequest(machine.disks, bases === undefined ? {} : { bases }));
  await frozen.release(noConnections);
  await frozen.keep();
  await machine.refresh();
  return frozen;
}

async function disksIn(directory: TemporaryDirectory): Promise<TestDisk[]> {
  return [
    { path: await createImage(directory.file("a.qcow2"), "qcow2", 8 * MiB), format: "qcow2" },
    { path: await createImage(directory.file("b.raw"), "raw", 8 * MiB), format: "raw" },
  ];
}

function start(disks: TestDisk[]): Promise<TestMachine> {
  return startMachine({ disks, guest: "none" });
}

describe("chooseBases()", () => {
  it("goes on with qcow2 and says why raw is full after a clean restart, and the increment is right", async () => {
    await using directory = await temporaryDirectory();
    const disks = await disksIn(directory);
    let point: CataloguePoint;
    {
      await using vm = await start(disks);
      await using machine = await openMachine(vm.qmp, directory.file("run"));
      point = pointOf(await commit(machine));
      await vm.qemuIo(0, "write -P 1 1M 64k");
      await vm.quit();
    }
    await using vm = await start([...disks].reverse());
    await vm.qemuIo(1, "write -P 1 2M 64k");
    await using machine = await openMachine(vm.qmp, directory.file("run"), {
      // The order of the disks was changed: names are the user's, tokens find the chains.
      select: [
        { device: "vd1", name: "vd0" },
        { device: "vd0", name: "vd1" },
      ],
    });
    const choices = await chooseBases(machine.disks, contextOf(point));
    const [raw, qcow2] = machine.disks;
    expect(choices.get(raw!)).toEqual({
      kind: "full",
      reason: "checkpoint bitmap missing (raw disk, QEMU restarted)",
      token: undefined,
    });
    expect(choices.get(qcow2!)).toMatchObject({
      kind: "incremental",
      checkpoint: point.id,
      token: point.disks[0]!.token,
      parentDiskName: "vd0",
      parentVirtualSize: 8 * MiB,
    });
    const { token } = point.disks[0]!;
    const base = qcow2!.bitmaps[0]!;
    const frozen = await machine.freeze(
      freezeRequest([qcow2!], { bases: new Map([["vd0", { base, token }]]) }),
    );
    expect([...(await dirtyClusters(frozen.disks[0]!))]).toEqual([16, 32]);
    await frozen.release(noConnections);
  });

  it("goes full after QEMU was killed, and the inconsistent bitmap goes once a newer point is there", async () => {
    await using directory = await temporaryDirectory();
    const disks = await disksIn(directory);
    let point: CataloguePoint;
    {
      await using vm = await start(disks);
      await using machine = await openMachine(vm.qmp, directory.file("run"));
      point = pointOf(await commit(machine));
      await vm.quit();
    }
    {
      await using vm = await start(disks);
      await vm.kill();
    }
    await using vm = await start(disks);
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const [qcow2] = machine.disks;
    expect(await chooseBase(qcow2!, contextOf(point))).toEqual({
      kind: "full",
      reason: "bitmap inconsistent: QEMU did not shut down cleanly",
      token: point.disks[0]!.token,
    });
    expect(await bitmapsToRemove(qcow2!, contextOf(point))).toEqual([]);
    const { token } = point.disks[0]!;
    const request = freezeRequest([qcow2!]);
    const frozen = await machine.freeze({ ...request, disks: [{ ...request.disks[0]!, token }] });
    await frozen.release(noConnections);
    await machine.refresh();
    const removable = await bitmapsToRemove(machine.disks[0]!, contextOf(point, pointOf(frozen)));
    expect(removable.map(({ why }) => why)).toEqual(["old"]);
    await machine.removeBitmaps(removable);
    expect((await residueOf(vm.monitor)).checkpoints).toEqual([frozen.disks[0]!.bitmap]);
  });

  it("goes on below an external snapshot, leaves the read-only bitmap, and can still clean up", async () => {
    await using directory = await temporaryDirectory();
    const disks = await disksIn(directory);
    await using vm = await start(disks);
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const first = await commit(machine);
    await vm.monitor.execute("blockdev-snapshot-sync", {
      "node-name": "node0",
      "snapshot-file": directory.file("overlay.qcow2"),
      "snapshot-node-name": "overlay",
    });
    await machine.refresh();
    const [disk] = machine.disks;
    expect(disk).toMatchObject({ node: "overlay", bitmaps: [{ node: "node0", readOnly: true }] });
    expect(await chooseBase(disk!, contextOf(pointOf(first)))).toMatchObject({
      kind: "incremental",
      base: { node: "node0", name: first.disks[0]!.bitmap },
      overlays: 1,
    });
    const before = await machine.freeze(freezeRequest(machine.disks, { bases: basesOf(first.disks) }));
    await before.release(noConnections);
    // A snapshot while the point is being committed: what is transient goes from the read-only node, too.
    const over = { "snapshot-file": directory.file("over.qcow2"), "snapshot-node-name": "over" };
    await vm.monitor.execute("blockdev-snapshot-sync", { "node-name": "overlay", ...over });
    await before.keep();
    expect((await residueOf(vm.monitor)).transient).toEqual([]);
    await machine.refresh();
    const second = await commit(machine);
    const context = contextOf(pointOf(first), pointOf(second));
    expect(await bitmapsToRemove(machine.disks[0]!, context)).toEqual([]);
    expect((await residueOf(vm.monitor)).transient).toEqual([]);
  });

  it("lets one of two disks with a copied image go on", async () => {
    await using directory = await temporaryDirectory();
    const [qcow2] = await disksIn(directory);
    let point: CataloguePoint;
    {
      await using vm = await start([qcow2!]);
      await using machine = await openMachine(vm.qmp, directory.file("run"));
      point = pointOf(await commit(machine));
      await vm.quit();
    }
    const copy = directory.file("copy.qcow2");
    await run("cp", [qcow2!.path, copy]);
    await using vm = await start([
      { path: copy, format: "qcow2", id: "copy" },
      { ...qcow2!, id: "vd0" },
    ]);
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const choices = await chooseBases(machine.disks, contextOf(point));
    const byName = new Map([...choices].map(([disk, choice]) => [disk.name, choice]));
    expect(byName.get("vd0")).toMatchObject({ kind: "incremental" });
    expect(byName.get("copy")).toEqual({
      kind: "full",
      reason: "carries the same checkpoint as disk vd0: a copied image",
    });
  });
});

describe("FreezeRequest.scratchLimit", () => {
  it("ends the frozen point when the guest overwrites more, before the guest is hurt", async () => {
    await using directory = await temporaryDirectory();
    const disks = await disksIn(directory);
    await using vm = await start(disks);
    await vm.qemuIo(0, "write -P 1 0 8M");
    await vm.qemuIo(1, "write -P 1 0 8M");
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    const frozen = await machine.freeze(freezeRequest(machine.disks, { scratchLimit: 7 * MiB }));
    // One disk may use what the other leaves: its own share is half.
    await vm.qemuIo(0, "write -P 2 0 4M");
    await frozen.assertIntact();
    expect(frozen.failed.aborted).toBe(false);
    const fired = once(frozen.failed, "abort");
    await vm.qemuIo(0, "write -P 2 4M 4M");
    await fired;
    expect(frozen.failed.reason).toBeInstanceOf(ScratchFullError);
    expect((frozen.failed.reason as Error).message).toContain("disk vd0");
    await frozen.release(noConnections);
    await frozen.drop();
    await vm.qemuIo(0, "write -P 3 0 8M");
    expect({ ...(await residueOf(vm.monitor)), checkpoints: [] }).toEqual(NOTHING);
  });

  it("is refused when it leaves no room to begin", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await start(await disksIn(directory));
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    await expect(machine.freeze(freezeRequest(machine.disks, { scratchLimit: 1000 }))).rejects.toThrow(
      ScratchFullError,
    );
    expect(await residueOf(vm.monitor)).toEqual(NOTHING);
  });
});
