import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { createImage, imageInfo, qemuIo } from "../support/image.js";
import { blockCommit, blockdevSnapshot, blockStream, snapshotSync } from "../support/snapshots.js";
import { pointOf } from "../support/rig.js";
import { diskOf, qcow2, raw, Story } from "../support/story.js";
import { readTrail } from "../support/guest.js";
import { run } from "../support/tools.js";

const INCREMENTAL = { vd0: "incremental" };

/** Bytes of everything that a disk of these tests holds at first. */
const FILL = "write -P 1 0 4M";

async function begin(): Promise<{ story: Story; base: string; file: (name: string) => string }> {
  const story = await Story.begin();
  const base = await story.rig.image("base.qcow2", "qcow2", 4 * MiB);
  return { story, base, file: (name) => story.rig.directory.file(name) };
}

describe("backup after external snapshots", () => {
  it("goes on with what the bitmap below and the overlays hold, and from there after SIGKILL", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    const other = await story.rig.image("other.raw", "raw", 4 * MiB);
    await story.start([qcow2(base), raw(other)]);
    const both = { vd0: "incremental", vd1: "incremental" };
    for (const disk of [0, 1]) await story.write(disk, FILL);
    await story.backup({ vd0: base, vd1: other });

    // One cluster before the snapshot; then in the overlay a part of one, zeroes, a discard of two.
    const overlays = [file("o0.qcow2"), file("o1.qcow2")] as const;
    for (const disk of [0, 1]) {
      await story.write(disk, "write -P 2 64k 64k");
      await snapshotSync(story.rig.machine, `node${disk}`, overlays[disk]!, `over${disk}`);
      await story.write(disk, "write -P 3 200k 1k", "write -z 512k 64k", "discard 1M 128k");
    }
    const first = await story.backup({ vd0: overlays[0], vd1: overlays[1] });
    expect(first.kinds).toEqual(both);
    for (const name of ["vd0", "vd1"]) {
      expect(diskOf(first.point, name)).toMatchObject({ dataClusters: 2, zeroClusters: 3 });
    }
    // The bitmap of the base stays, as nobody can remove it there; the new one is on the overlay.
    expect((await story.bitmaps(base)).map(({ recording }) => recording)).toEqual([true]);
    expect(await story.bitmaps(overlays[0])).toMatchObject([{ persistent: true, recording: true }]);

    // Nothing happened: nothing is stored, and the node below plays no role any more.
    expect(diskOf((await story.backup({ vd0: overlays[0], vd1: overlays[1] })).point, "vd0")).toMatchObject({
      dataClusters: 0,
      zeroClusters: 0,
      dirtyBytes: 0,
    });

    // Several at once, each with something of its own and something again.
    const chain = [overlays[0], file("p.qcow2"), file("q.qcow2"), file("r.qcow2")] as const;
    for (const [number, name] of ["p", "q", "r"].entries()) {
      await story.write(0, `write -P ${4 + number} ${2048 + 64 * number}k 96k`, "discard 3M 64k");
      await snapshotSync(
        story.rig.machine,
        number === 0 ? "over0" : ["p", "q"][number - 1]!,
        chain[number + 1]!,
        name,
      );
    }
    await story.write(0, "write -P 9 3M 512");
    const deep = await story.backup({ vd0: chain[3], vd1: overlays[1] });
    expect(deep.kinds).toEqual(both);
    expect(diskOf(deep.point, "vd0")).toMatchObject({ dataClusters: 5 });

    // The newest bitmap was never stored. The one below was, when the snapshot on top of it was taken.
    await story.write(0, "write -P 10 3584k 512", "flush");
    await story.rig.machine.kill();
    await story.start([qcow2(chain[3]), qcow2(overlays[1])]);
    const status = await story.next();
    const killed = await story.backup({ vd0: chain[3], vd1: overlays[1] });
    expect(killed.kinds["vd0"]).toBe("incremental");
    expect(status).toEqual(killed.kinds);
    expect(diskOf(killed.point, "vd0").parent).toBe(diskOf(deep.point, "vd0").parent);
    expect(diskOf(killed.point, "vd0")).toMatchObject({ dataClusters: 6 });
    await story.write(0, "write -P 11 0 512");
    expect((await story.backup({ vd0: chain[3], vd1: overlays[1] })).kinds).toEqual(both);
    await story.proveAll();
  });

  it("is right while the guest writes before, during and after the snapshot", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    // So slow that its trail is long from complete between two backups.
    const guest = { trailOffset: 256 * KiB, trailBlocks: 400, stepsPerTick: 1 };
    await story.rig.image("base.qcow2", "qcow2", 26 * MiB);
    await story.start([qcow2(base, { iothread: true })], { guest });
    const { machine, proxy } = story.rig;
    await machine.waitForGuestWriting(8);
    await story.backup({ vd0: base });
    await machine.waitForGuestWriting(8);
    await snapshotSync(machine, "node0", file("one.qcow2"), "one");
    await machine.waitForGuestWriting(40);
    const first = await story.backup({ vd0: file("one.qcow2") });
    await machine.waitForGuestWriting(8);
    await blockdevSnapshot(
      machine,
      "one",
      { path: file("one.qcow2"), format: "qcow2" },
      file("two.qcow2"),
      "two",
      26 * MiB,
    );
    await machine.waitForGuestWriting(8);
    // Taken between the look at the disks and the freeze, a snapshot ends the run; the next one is right.
    const hook = proxy.onCommand("blockdev-create", async () => {
      hook.remove();
      await snapshotSync(machine, "two", file("three.qcow2"), "three");
    });
    const refused = await story.rig.run(story.rig.backupArguments());
    expect(hook.fired).toBe(1);
    expect(refused.code).toBe(5);
    await machine.waitForGuestWriting(8);
    const second = await story.backup({ vd0: file("three.qcow2") });
    for (const { kinds, point } of [first, second]) {
      expect(kinds).toEqual(INCREMENTAL);
      await readTrail(
        story.rig.reference(point, file(point === first.point ? "one.qcow2" : "three.qcow2")),
        guest,
      );
    }
    await story.proveAll();
  });

  it("goes on across a restart, with an overlay of other clusters, and one made while the machine was off", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    await story.start([qcow2(base)]);
    await story.write(0, FILL);
    await story.backup({ vd0: base });
    await story.write(0, "write -P 2 0 4k");
    await story.rig.machine.quit();
    const backing = { path: base, format: "qcow2" } as const;
    const fine = await createImage(file("fine.qcow2"), "qcow2", 4 * MiB, {
      backing,
      create: { cluster_size: "4k" },
    });
    await qemuIo(fine, "qcow2", ["write -P 3 1M 512"]);
    await story.start([qcow2(fine)]);
    await story.write(0, "write -P 4 1028k 4k", "discard 2M 8k");
    const first = await story.backup({ vd0: fine });
    expect(first.kinds).toEqual(INCREMENTAL);
    expect(diskOf(first.point, "vd0")).toMatchObject({ dataClusters: 3 });

    await story.rig.machine.quit();
    const coarse = await createImage(file("coarse.qcow2"), "qcow2", 4 * MiB, {
      backing: { path: fine, format: "qcow2" },
      create: { cluster_size: "1M" },
    });
    await qemuIo(coarse, "qcow2", ["write -P 5 3M 512"]);
    // The machine off, by its image.
    const status = (await run("qemu-img", ["map", "--output=json", coarse])).stdout;
    expect(status).toContain('"depth": 2');
    const off = await story.backupImage("vd0", coarse);
    expect(off.kinds).toEqual(INCREMENTAL);
    expect(diskOf(off.point, "vd0")).toMatchObject({ dataClusters: 16 });
    await story.start([qcow2(coarse)]);
    await story.write(0, "write -P 6 0 512");
    expect((await story.backup({ vd0: coarse })).kinds).toEqual(INCREMENTAL);
    await story.proveAll();
  });
});

describe("backup after snapshots were merged", () => {
  it("goes on after commits of the active overlay, in cycles, and of one in the middle", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    await story.start([qcow2(base)]);
    const { machine } = story.rig;
    await story.write(0, FILL);
    const zero = await story.backup({ vd0: base });

    // Snapshot, commit, and a snapshot again: the overlay that is looked at never held the first change.
    await snapshotSync(machine, "node0", file("a.qcow2"), "a");
    await story.write(0, "write -P 2 64k 64k", "discard 1M 64k", "write -z 1088k 64k");
    await blockCommit(machine, { device: "a", "base-node": "node0" });
    await snapshotSync(machine, "node0", file("b.qcow2"), "b");
    await story.write(0, "write -P 3 256k 512");
    const cycle = await story.backup({ vd0: file("b.qcow2") });
    expect(cycle.kinds).toEqual(INCREMENTAL);
    expect(diskOf(cycle.point, "vd0")).toMatchObject({ dataClusters: 2, zeroClusters: 2 });

    // Committed after a backup of the overlay: its checkpoint is gone with it, the one before goes on: a branch.
    await story.write(0, "write -P 4 320k 512");
    await blockCommit(machine, { device: "b", "base-node": "node0" });
    await story.write(0, "write -P 5 384k 512");
    const branch = await story.backup({ vd0: base });
    expect(branch.kinds).toEqual(INCREMENTAL);
    expect(diskOf(branch.point, "vd0").parent).toBe(zero.point.id);
    expect(diskOf(branch.point, "vd0")).toMatchObject({ dataClusters: 4, zeroClusters: 2 });
    expect(await story.bitmaps(base)).toHaveLength(1);

    // In the middle: into the image with the bitmap, then into an overlay above it.
    await snapshotSync(machine, "node0", file("c.qcow2"), "c");
    await story.write(0, "write -P 6 1536k 512");
    await snapshotSync(machine, "c", file("d.qcow2"), "d");
    await story.write(0, "write -P 7 1600k 512");
    await blockCommit(machine, { device: "d", "top-node": "c", "base-node": "node0" });
    await snapshotSync(machine, "d", file("e.qcow2"), "e");
    await story.write(0, "write -P 8 1664k 512", "discard 1536k 64k");
    await snapshotSync(machine, "e", file("f.qcow2"), "f");
    await blockCommit(machine, { device: "f", "top-node": "e", "base-node": "d" });
    const middle = await story.backup({ vd0: file("f.qcow2") });
    expect(middle.kinds).toEqual(INCREMENTAL);
    expect(diskOf(middle.point, "vd0").parent).toBe(branch.point.id);
    expect(diskOf(middle.point, "vd0")).toMatchObject({ dataClusters: 2, zeroClusters: 1 });
    await story.proveAll();
  });

  it("trusts the bitmap of an image that was committed into, unless QEMU was killed meanwhile", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    await story.start([qcow2(base)]);
    await story.write(0, FILL);
    const first = await story.backup({ vd0: base });
    const chain = async (below: string, lower: string, upper: string): Promise<void> => {
      await snapshotSync(story.rig.machine, below, file(`${lower}.qcow2`), lower);
      await story.write(0, "write -P 2 64k 64k", "write -P 3 1M 1M");
      await snapshotSync(story.rig.machine, lower, file(`${upper}.qcow2`), upper);
      await story.write(0, "write -P 4 3M 512", "flush");
    };
    await chain("node0", "a", "b");
    await blockCommit(story.rig.machine, { device: "b", "top-node": "a", "base-node": "node0" });
    // What was recorded is in the file: the image is read-only again.
    await story.rig.machine.kill();
    await story.start([qcow2(file("b.qcow2"))]);
    const after = await story.backup({ vd0: file("b.qcow2") });
    expect(after.kinds).toEqual(INCREMENTAL);
    expect(diskOf(after.point, "vd0")).toMatchObject({ dataClusters: 18 });

    await chain("node0", "c", "d");
    const job = { device: "d", "top-node": "c", "base-node": "node0", speed: 1 };
    const running = story.rig.machine.monitor.nextEvent(
      "JOB_STATUS_CHANGE",
      ({ status }) => status === "running",
    );
    await story.rig.machine.monitor.execute("block-commit", { "job-id": "commit", ...job });
    await running;
    await story.rig.machine.kill();
    await story.start([qcow2(file("d.qcow2"))]);
    const killed = await story.backup({ vd0: file("d.qcow2") });
    // The image that was being written to is not trusted; the one below it, which nobody touched, is.
    expect(killed.kinds).toEqual(INCREMENTAL);
    expect((await imageInfo(file("b.qcow2")))["format-specific"]?.data.bitmaps?.[0]?.flags).toContain(
      "in-use",
    );
    expect(diskOf(killed.point, "vd0").parent).toBe(first.point.id);
    await story.proveAll();
  });

  it("goes on after a stream that leaves the image with the bitmap, and says so when it is gone", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    await story.start([qcow2(base)]);
    const { machine } = story.rig;
    await story.write(0, FILL);
    await story.backup({ vd0: base });
    await snapshotSync(machine, "node0", file("a.qcow2"), "a");
    await story.write(0, "write -P 2 64k 64k");
    await snapshotSync(machine, "a", file("b.qcow2"), "b");
    await story.write(0, "write -P 3 256k 512", "write -z 64k 64k");
    await blockStream(machine, { device: "b", "base-node": "node0" });
    const kept = await story.backup({ vd0: file("b.qcow2") });
    expect(kept.kinds).toEqual(INCREMENTAL);
    expect(diskOf(kept.point, "vd0")).toMatchObject({ dataClusters: 1, zeroClusters: 1 });

    await snapshotSync(machine, "b", file("c.qcow2"), "c");
    await story.write(0, "write -P 4 512k 512");
    await blockStream(machine, { device: "c" });
    const lost = await story.backup({ vd0: file("c.qcow2") });
    expect(lost.kinds["vd0"]).toContain("compared: checkpoint bitmap missing");
    await story.write(0, "write -P 5 512k 512");
    expect((await story.backup({ vd0: file("c.qcow2") })).kinds).toEqual(INCREMENTAL);
    await story.proveAll();
  });

  it("goes on after qemu-img committed, rebased and took overlays away", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    const backing = { path: base, format: "qcow2" } as const;
    await story.start([qcow2(base)]);
    await story.write(0, FILL);
    const zero = await story.backup({ vd0: base });
    await story.rig.machine.quit();

    const over = await createImage(file("over.qcow2"), "qcow2", 4 * MiB, { backing });
    const above = await createImage(file("above.qcow2"), "qcow2", 4 * MiB, {
      backing: { path: over, format: "qcow2" },
    });
    await qemuIo(over, "qcow2", ["write -P 2 64k 64k", "discard 1M 64k"]);
    await qemuIo(above, "qcow2", ["write -P 3 256k 512"]);
    await run("qemu-img", ["commit", "-q", "-f", "qcow2", over]);
    // `over` is empty now; what it held is in the base, whose bitmap has seen it.
    await run("qemu-img", ["rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, above]);
    await story.start([qcow2(above)]);
    const committed = await story.backup({ vd0: above });
    expect(committed.kinds).toEqual(INCREMENTAL);
    expect(diskOf(committed.point, "vd0")).toMatchObject({ dataClusters: 2, zeroClusters: 1 });

    // Back to the image below, as it was: the overlay is thrown away.
    await story.write(0, "write -P 4 512k 512");
    await story.restart([qcow2(base)]);
    await story.write(0, "write -P 5 768k 512");
    const reverted = await story.backup({ vd0: base });
    expect(reverted.kinds).toEqual(INCREMENTAL);
    expect(diskOf(reverted.point, "vd0").parent).toBe(zero.point.id);

    // And an overlay that is older than the checkpoint below it.
    await story.restart([qcow2(above)]);
    await story.write(0, "write -P 6 832k 512");
    const older = await story.backup({ vd0: above });
    expect(older.kinds).toEqual(INCREMENTAL);
    expect((await imageInfo(base))["format-specific"]?.data.bitmaps).toHaveLength(1);
    await story.proveAll();
  });
});

describe("backup while somebody works on the overlays", () => {
  it("ends when a job begins that shifts what QEMU says about them, and the next one is right", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    await story.start([qcow2(base)]);
    const { machine, proxy } = story.rig;
    await story.write(0, FILL);
    await story.backup({ vd0: base });
    for (const [below, name, place] of [
      ["node0", "low", "64k"],
      ["low", "mid", "1M"],
      ["mid", "top", "192k"],
    ] as const) {
      await snapshotSync(machine, below, file(`${name}.qcow2`), name);
      await story.write(0, `write -P 2 ${place} ${name === "mid" ? "2M" : "1k"}`);
    }
    const top = file("top.qcow2");
    const job = { "job-id": "stream", device: "top", "base-node": "low", speed: 1 };
    const hook = proxy.onCommand(
      "block-export-add",
      async () => {
        hook.remove();
        await machine.monitor.execute("block-stream", job);
      },
      "after",
    );
    const refused = await story.rig.run(story.rig.backupArguments());
    expect(hook.fired).toBe(1);
    if (refused.code === 0) story.adopt(pointOf(refused.events()), { vd0: top });
    else expect(refused.events().at(-1)).toMatchObject({ code: "TM_MACHINE_BUSY", exitCode: 5 });
    expect((await story.leftovers()).length).toBe(0);

    // Whatever it did meanwhile: slow as it is, a drain wakes it up.
    const jobs = await machine.monitor.execute<{ id: string }[]>("query-jobs");
    for (const { id } of jobs) {
      const cancelled = machine.monitor.nextEvent("BLOCK_JOB_CANCELLED");
      await machine.monitor.execute("block-job-cancel", { device: id });
      await cancelled;
    }
    expect((await story.backup({ vd0: top })).kinds).toEqual(INCREMENTAL);
    await story.proveAll();
    expect(refused.code).toBe(5);
  });
});

describe("backup where an overlay has another size", () => {
  it("compares when the disk was resized above the bitmap, and on when it has its size again", async () => {
    const { story: opened, base, file } = await begin();
    await using story = opened;
    await story.start([qcow2(base)]);
    const { machine } = story.rig;
    const resize = (node: string, size: number): Promise<unknown> =>
      machine.monitor.execute("block_resize", { "node-name": node, size });
    await story.write(0, FILL);
    await story.backup({ vd0: base });
    await snapshotSync(machine, "node0", file("a.qcow2"), "a");
    await story.write(0, "write -P 2 64k 64k");
    await resize("a", 6 * MiB);
    const grown = await story.backup({ vd0: file("a.qcow2") });
    expect(grown.kinds["vd0"]).toMatch(/^compared: .* and the disk resized/);

    // Cut and grown back above the bitmap: behind the cut the base must not shine through.
    await snapshotSync(machine, "a", file("b.qcow2"), "b");
    await resize("b", 2 * MiB + 4 * KiB);
    await snapshotSync(machine, "b", file("c.qcow2"), "c");
    await resize("c", 6 * MiB);
    await story.write(0, "write -P 3 5M 512");
    const cut = await story.backup({ vd0: file("c.qcow2") });
    expect(cut.kinds).toEqual(INCREMENTAL);
    // Cut below it, before the snapshot.
    await resize("c", MiB + 512);
    await resize("c", 6 * MiB);
    await snapshotSync(machine, "c", file("d.qcow2"), "d");
    await story.write(0, "write -P 4 3M 512");
    expect((await story.backup({ vd0: file("d.qcow2") })).kinds).toEqual(INCREMENTAL);
    await story.proveAll();
  });
});
