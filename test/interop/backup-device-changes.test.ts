import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { startTidemark } from "../support/cli.js";
import { readTrail } from "../support/guest.js";
import { pointOf } from "../support/rig.js";
import { diskOf, qcow2, raw, Story } from "../support/story.js";

const scsi = { bus: "virtio-scsi" } as const;

/** Unplugs a SCSI disk, which needs no word of the guest. */
async function unplug(story: Story, id: string): Promise<void> {
  const { monitor } = story.rig.machine;
  const gone = monitor.nextEvent("DEVICE_DELETED", ({ device }) => device === id);
  await monitor.execute("device_del", { id });
  await gone;
}

/** Plugs a SCSI disk in. */
async function plug(story: Story, id: string, drive: string): Promise<void> {
  await story.rig.machine.monitor.execute("device_add", { driver: "scsi-hd", bus: "scsi0.0", id, drive });
}

/** Begins a slow backup, does something once it reads, and lets it end. */
async function duringBackup(story: Story, action: () => Promise<void>): Promise<ReturnType<typeof pointOf>> {
  const env = { TIDEMARK_RUNTIME_DIR: story.rig.directory.file("run") };
  await using agent = startTidemark(story.rig.backupArguments(["--bandwidth", "2MiB"]), { env });
  await agent.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
  await action();
  const result = await agent.ended;
  expect(result.code, result.stdout + result.stderr).toBe(0);
  return pointOf(result.events());
}

describe("backup while the machine's devices change", () => {
  it("is right across resets of the guest, between backups and during one", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", 6 * MiB);
    const b = await story.rig.image("b.raw", "raw", 6 * MiB);
    const images = { vd0: a, vd1: b };
    const guest = { trailOffset: 256 * KiB, trailBlocks: 80, stepsPerTick: 1 };
    await story.start([qcow2(a), raw(b)], { guest });
    const { machine } = story.rig;
    const reset = async (): Promise<void> => {
      const done = machine.monitor.nextEvent("RESET");
      await machine.monitor.execute("system_reset");
      await done;
    };
    await machine.qemuIo(0, "write -P 1 5500k 400k");
    await machine.waitForGuestWriting(4);
    await story.backup(images);
    await reset();
    await machine.waitForGuestWriting(4);
    const after = await story.backup(images);
    expect(after.kinds).toEqual({ vd0: "incremental", vd1: "incremental" });
    await machine.qemuIo(0, "write -P 2 4M 1900k");
    const during = story.adopt(await duringBackup(story, reset), images);
    expect(during.kinds).toEqual({ vd0: "incremental", vd1: "incremental" });
    await machine.waitForGuestWriting(4);
    const last = await story.backup(images);
    expect(last.kinds).toEqual({ vd0: "incremental", vd1: "incremental" });
    await readTrail(story.rig.reference(last.point, b), guest);
    await story.proveAll();
  });

  it("finishes with a disk that is unplugged meanwhile, and goes on when it is plugged in again", async () => {
    await using story = await Story.begin();
    const [a, b, c] = (await Promise.all(
      ["a", "b", "c"].map((name) => story.rig.image(`${name}.qcow2`, "qcow2", 16 * MiB)),
    )) as [string, string, string];
    const images = { va: a, vb: b, vc: c };
    await story.start([
      qcow2(a, { id: "va", ...scsi }),
      qcow2(b, { id: "vb", ...scsi }),
      // QEMU drops the node of such a disk with its device.
      qcow2(c, { id: "vc", style: "drive", ...scsi }),
    ]);
    for (const disk of ["va", "vb", "vc"]) await story.write(disk, "write -P 1 0 4M");
    const first = story.adopt(await duringBackup(story, () => unplug(story, "vb")), images);
    expect(await story.leftovers()).toEqual([]);
    const without = await story.backup({ va: a, vc: c });
    expect(without.kinds).toEqual({ va: "incremental", vc: "incremental" });
    expect(story.rig.warnings.join("\n")).toContain(`lacks "vb"`);
    await plug(story, "vb", "node1");
    await story.write("vb", "write -P 2 64k 1k");
    const back = await story.backup(images);
    expect(back.kinds).toEqual({ va: "incremental", vb: "incremental", vc: "incremental" });
    expect(diskOf(back.point, "vb")).toMatchObject({ parent: first.point.id, dataClusters: 1 });

    // With such a drive QEMU drops its node, and cancels the jobs on it.
    // In many pieces: reading goes on long after the first of them.
    await story.write("vc", "write -P 3 0 12M");
    const env = { TIDEMARK_RUNTIME_DIR: story.rig.directory.file("run") };
    await using agent = startTidemark(story.rig.backupArguments(["--bandwidth", "1MiB"]), { env });
    await agent.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    await unplug(story, "vc");
    const lost = await agent.ended;
    expect(lost.code).toBe(1);
    expect(lost.events().at(-1)).toMatchObject({ event: "error", code: "TM_SNAPSHOT_LOST" });
    expect(await story.leftovers()).toEqual([]);
    expect((await story.backup({ va: a, vb: b })).kinds).toEqual({ va: "incremental", vb: "incremental" });
    const file = { driver: "file", filename: c };
    const { monitor } = story.rig.machine;
    await monitor.execute("blockdev-add", { driver: "qcow2", "node-name": "again", discard: "unmap", file });
    await plug(story, "vc", "again");
    await story.write("-d /machine/peripheral/vc", "write -P 4 64k 1k");
    const again = await story.backup(images);
    expect(again.kinds["vc"]).toBe("incremental");
    expect(diskOf(again.point, "vc").parent).toBe(back.point.id);
    await story.proveAll();
  });

  it("leaves a disk that comes between plan and freeze to the next backup, and misses none that goes", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", MiB);
    const b = await story.rig.image("b.qcow2", "qcow2", MiB);
    await story.start([qcow2(a, { id: "va", ...scsi })]);
    await story.write("va", "write -P 1 0 1M");
    const { machine, proxy } = story.rig;
    const beforeFreeze = async (action: () => Promise<void>): Promise<{ readonly fired: number }> => {
      const hook = proxy.onCommand("blockdev-create", async () => {
        hook.remove();
        await action();
      });
      return Promise.resolve(hook);
    };
    const added = await beforeFreeze(async () => {
      const file = { driver: "file", filename: b };
      await machine.monitor.execute("blockdev-add", { driver: "qcow2", "node-name": "nb", file });
      await plug(story, "vb", "nb");
      await story.write("-d /machine/peripheral/vb", "write -P 2 0 1M");
    });
    await story.backup({ va: a });
    expect(added.fired).toBe(1);
    expect((await story.backup({ va: a, vb: b })).kinds).toEqual({
      va: "incremental",
      vb: "first backup of this disk",
    });

    const removed = await beforeFreeze(() => unplug(story, "vb"));
    const refused = await story.rig.run(story.rig.backupArguments());
    expect(removed.fired).toBe(1);
    expect(refused.code).toBe(5);
    expect(refused.stderr + refused.stdout).toContain("vb");
    expect(await story.leftovers()).toEqual([]);
    expect((await story.backup({ va: a })).kinds).toEqual({ va: "incremental" });
    await plug(story, "vb", "nb");
    await story.write("-d /machine/peripheral/vb", "write -P 3 64k 1k");
    expect((await story.backup({ va: a, vb: b })).kinds).toEqual({ va: "incremental", vb: "incremental" });
    await story.proveAll();
  });

  it("removes its bitmaps when a disk goes at that very moment", async () => {
    await using story = await Story.begin();
    const a = await story.rig.image("a.qcow2", "qcow2", MiB);
    const b = await story.rig.image("b.qcow2", "qcow2", MiB);
    await story.start([qcow2(a, { id: "va", ...scsi }), qcow2(b, { id: "vb", style: "drive", ...scsi })]);
    for (const disk of ["va", "vb"]) await story.write(disk, "write -P 1 0 1M");
    await story.backup({ va: a, vb: b });
    await story.write("va", "write -P 2 64k 1k");
    const { proxy } = story.rig;
    let isUnplugged = false;
    const hook = proxy.onCommand("transaction", async ({ arguments: given }) => {
      if (!JSON.stringify(given).includes('"block-dirty-bitmap-remove"')) return;
      hook.remove();
      await unplug(story, "vb");
      isUnplugged = true;
    });
    await story.backup({ va: a, vb: b });
    expect(isUnplugged).toBe(true);
    expect(story.rig.warnings).toEqual([]);
    expect(await story.leftovers()).toEqual([]);
    expect((await story.backup({ va: a })).kinds).toEqual({ va: "incremental" });
    await story.proveAll();
  });
});
