import { copyFile, rm } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { MiB } from "../../src/bytes/index.js";
import { imageInfo, qemuIo } from "../support/image.js";
import type { TestDisk } from "../support/qemu.js";
import { diskOf, qcow2, Story, type Taken } from "../support/story.js";
import { run } from "../support/tools.js";

/** Why a disk is read in full, whether all of it is stored then or only what differs. */
function reasonOf(text: string | undefined): string {
  return (text ?? "").replace(/^(will be )?compared: /, "");
}

/** Takes a point whose kinds and reasons `status` must have told before. */
async function foretoldBackup(story: Story, images: Readonly<Record<string, string>>): Promise<Taken> {
  const before = await story.next();
  const taken = await story.backup(images);
  const reasons = (kinds: Readonly<Record<string, string>>): unknown =>
    Object.fromEntries(Object.entries(kinds).map(([name, kind]) => [name, reasonOf(kind)]));
  expect(reasons(before)).toEqual(reasons(taken.kinds));
  return taken;
}

async function imagesOf(story: Story, names: readonly string[]): Promise<Record<string, string>> {
  const images = names.map(
    async (name) => [name, await story.rig.image(`${name}.qcow2`, "qcow2", MiB)] as const,
  );
  return Object.fromEntries(await Promise.all(images));
}

describe("backup of disks each with a trouble of its own", () => {
  it("heals every disk alone, and the others stay incremental", async () => {
    await using story = await Story.begin();
    const names = ["sound", "removed", "stopped", "replaced", "moved", "called", "damaged"] as const;
    const images = await imagesOf(story, names);
    const disk = (name: string, more: Partial<TestDisk> = {}): TestDisk =>
      qcow2(images[name]!, { id: name, nodeName: `n-${name}`, ...more });
    await story.start(names.map((name) => disk(name)));
    for (const name of names) await story.write(name, "write -P 1 0 1M");
    await story.backup(images);
    for (const name of names) await story.write(name, "write -P 2 64k 1k");
    const stored = await story.backup(images);
    await story.rig.machine.quit();

    const other = await story.rig.image("other.qcow2", "qcow2", MiB);
    await qemuIo(other, "qcow2", ["write -P 9 0 300k"]);
    images["replaced"] = other;
    images["renamed"] = images["called"]!;
    delete images["called"];
    const folder = `${story.rig.repository}/vm/${stored.point.id}`;
    await rm(`${folder}/${diskOf(stored.point, "damaged").image}`);
    // Another bus, another order, another id.
    await story.start([
      disk("moved", { bus: "virtio-scsi" }),
      disk("renamed", { bus: "ide" }),
      ...["damaged", "replaced", "stopped", "removed", "sound"].map((name) => disk(name)),
    ]);
    const { monitor } = story.rig.machine;
    const bitmapOf = async (name: string): Promise<string> => (await story.bitmaps(images[name]!))[0]!.name;
    const change = async (command: string, name: string): Promise<void> => {
      await monitor.execute(command, { node: `n-${name}`, name: await bitmapOf(name) });
    };
    await change("block-dirty-bitmap-remove", "removed");
    await change("block-dirty-bitmap-disable", "stopped");
    for (const name of Object.keys(images)) await story.write(name, "write -P 3 128k 1k");
    const healed = await foretoldBackup(story, images);
    const reasons = Object.entries(healed.kinds).map(([name, kind]) => [name, reasonOf(kind)]);
    expect(Object.fromEntries(reasons)).toEqual({
      sound: "incremental",
      moved: "incremental",
      renamed: "incremental",
      removed: expect.stringContaining("checkpoint bitmap missing") as string,
      stopped: expect.stringContaining("bitmap does not record") as string,
      replaced: expect.stringContaining("checkpoint bitmap missing") as string,
      damaged: expect.stringContaining("parent damaged") as string,
    });
    expect(diskOf(healed.point, "renamed").token).toBe(diskOf(stored.point, "called").token);
    expect(story.rig.warnings.join("\n")).toMatch(/"damaged".*parent/);

    for (const name of Object.keys(images)) await story.write(name, "write -P 4 192k 1k");
    const next = await foretoldBackup(story, images);
    expect(new Set(Object.values(next.kinds))).toEqual(new Set(["incremental"]));
    for (const image of Object.values(images)) expect(await story.bitmaps(image)).toHaveLength(1);
    // The image of the damaged disk's second point is gone, and with it what that point held of that disk.
    story.forget(stored.point);
    await story.proveAll();
  });
});

describe("backup of an older copy of an image", () => {
  it("goes on from the checkpoint that the copy carries, as a branch", async () => {
    await using story = await Story.begin();
    const { vd0 } = (await imagesOf(story, ["vd0"])) as { vd0: string };
    const [after, later] = [story.rig.directory.file("after.qcow2"), story.rig.directory.file("later.qcow2")];
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 1 0 1M");
    const first = await story.backup({ vd0 });
    // One copy just after the backup; one with changes, before the next backup.
    await story.rig.machine.quit();
    await copyFile(vd0, after);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 2 64k 1k");
    await story.rig.machine.quit();
    await copyFile(vd0, later);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 3 128k 1k");
    const second = await story.backup({ vd0 });
    await story.write(0, "write -P 4 192k 1k");

    await story.rig.machine.quit();
    await copyFile(after, vd0);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 5 256k 1k");
    const back = await foretoldBackup(story, { vd0 });
    expect(back.kinds).toEqual({ vd0: "incremental" });
    expect(diskOf(back.point, "vd0")).toMatchObject({ parent: first.point.id, dataClusters: 1 });

    await story.rig.machine.quit();
    await copyFile(later, vd0);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 6 320k 1k");
    const again = await foretoldBackup(story, { vd0 });
    expect(diskOf(again.point, "vd0")).toMatchObject({ parent: first.point.id, dataClusters: 2 });
    expect([second.point.id, back.point.id]).not.toContain(diskOf(again.point, "vd0").parent);
    await story.proveAll();
  });

  it("does not trust a copy of an image that a machine had open, whatever it carries", async () => {
    await using story = await Story.begin();
    const { vd0 } = (await imagesOf(story, ["vd0"])) as { vd0: string };
    const copy = story.rig.directory.file("copy.qcow2");
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 1 0 1M", "flush");
    const first = await story.backup({ vd0 });
    // Its bitmap is not stored yet.
    await copyFile(vd0, copy);
    await story.write(0, "write -P 2 64k 1k");
    await story.rig.machine.quit();
    await copyFile(copy, vd0);
    await story.start([qcow2(vd0)]);
    const lost = await foretoldBackup(story, { vd0 });
    expect(lost.kinds["vd0"]).toContain("checkpoint bitmap missing");
    await story.restart([qcow2(vd0)]);
    await story.write(0, "write -P 3 128k 1k", "flush");
    // Stored, and marked as in use.
    await copyFile(vd0, copy);
    await story.write(0, "write -P 4 192k 1k");
    await story.backup({ vd0 });
    await story.rig.machine.quit();
    await copyFile(copy, vd0);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 5 256k 1k");
    const used = await foretoldBackup(story, { vd0 });
    expect(used.kinds["vd0"]).toContain("bitmap inconsistent");
    expect(diskOf(used.point, "vd0").parent).not.toBe(first.point.id);
    await story.proveAll();
  });

  it("does not go on after an internal snapshot was reverted to, which takes removing the checkpoint", async () => {
    await using story = await Story.begin();
    const { vd0 } = (await imagesOf(story, ["vd0"])) as { vd0: string };
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 1 0 1M");
    await story.backup({ vd0 });
    await story.write(0, "write -P 2 64k 1k");
    await story.rig.machine.quit();
    await run("qemu-img", ["snapshot", "-c", "then", vd0]);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 3 128k 1k");
    const between = await story.backup({ vd0 });
    expect(between.kinds).toEqual({ vd0: "incremental" });
    await story.rig.machine.quit();

    const revert = ["snapshot", "-a", "then", vd0];
    const refused = await run("qemu-img", revert, { codes: [1] });
    expect(refused.stderr).toContain("dirty bitmaps");
    const bitmaps = (await imageInfo(vd0))["format-specific"]?.data.bitmaps ?? [];
    expect(bitmaps).toHaveLength(1);
    for (const { name } of bitmaps) await run("qemu-img", ["bitmap", "--remove", vd0, name]);
    await run("qemu-img", revert);
    await story.start([qcow2(vd0)]);
    await story.write(0, "write -P 4 192k 1k");
    const reverted = await foretoldBackup(story, { vd0 });
    expect(reverted.kinds["vd0"]).toContain("checkpoint bitmap missing");
    await story.proveAll();
  });
});
