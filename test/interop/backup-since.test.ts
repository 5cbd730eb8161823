import { describe, expect, it } from "vitest";
import { compareImages, imageInfo, qemuIo, toRaw } from "../support/image.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";

const MiB = 1024 * 1024;

interface Checkpoint {
  readonly id: string;
  readonly repository: string;
  readonly dirtyBytes: number;
  readonly state: string;
}

/** What `status` shows of each disk's checkpoints, the newest first. */
async function checkpointsOf(rig: Rig): Promise<Record<string, Checkpoint[]>> {
  const args = ["status", "--qmp", rig.proxy.socket, "--machine", "vm", "--repo", rig.repository, "--json"];
  const { disks } = (await rig.tidemark(args)).json() as {
    disks: { name: string; checkpoints: Checkpoint[] }[];
  };
  const newestFirst = (list: Checkpoint[]): Checkpoint[] => list.toSorted((a, b) => (a.id < b.id ? 1 : -1));
  return Object.fromEntries(disks.map(({ name, checkpoints }) => [name, newestFirst(checkpoints)]));
}

async function idsOf(rig: Rig): Promise<Record<string, string[]>> {
  const all = Object.entries(await checkpointsOf(rig));
  return Object.fromEntries(all.map(([name, list]) => [name, list.map(({ id }) => id)]));
}

/** The node that has a qcow2 image, and the names of its bitmaps, as QEMU tells. */
async function bitmapsOf(rig: Rig, image: string): Promise<{ node: string; names: (string | undefined)[] }> {
  const nodes =
    await rig.machine.monitor.execute<
      { "node-name": string; drv: string; file: string; "dirty-bitmaps"?: { name?: string }[] }[]
    >("query-named-block-nodes");
  const found = nodes.find(({ drv, file }) => drv === "qcow2" && file === image);
  if (found === undefined) throw new Error(`No node has ${image}`);
  return { node: found["node-name"], names: (found["dirty-bitmaps"] ?? []).map(({ name }) => name) };
}

const summary = ({ disks }: PointView): unknown[] =>
  disks.map(({ name, kind, parent, reason }) => [name, kind, parent, reason]);

/** A machine whose guest does nothing, with a qcow2 and a raw disk. */
async function twoDisks(
  rig: Rig,
): Promise<{ images: Record<string, string>; start: () => Promise<unknown> }> {
  const a = await rig.image("a.qcow2", "qcow2", 16 * MiB);
  const b = await rig.image("b.raw", "raw", 8 * MiB + 512);
  const disks = [
    { path: a, format: "qcow2", id: "vda" },
    { path: b, format: "raw", id: "vdb" },
  ] as const;
  const start = (): Promise<unknown> => rig.start(disks, { guest: "none" });
  await start();
  return { images: { vda: a, vdb: b }, start };
}

/** Writes, zeroes and discards on both disks, another pattern each time. */
async function change(rig: Rig, pattern: number): Promise<void> {
  await rig.machine.qemuIoAll(0, [
    ...[`write -P ${pattern} ${pattern}M 100k`, `write -P 1${pattern} 12M 64k`],
    `discard ${pattern - 1}M 64k`,
  ]);
  await rig.machine.qemuIoAll(1, [
    ...[`write -P ${pattern} ${pattern * 512}k 70k`, `write -z ${(pattern - 1) * 512}k 64k`],
    `write -P 2${pattern} 8M 512`,
  ]);
}

const BOTH = { vda: "identical", vdb: "identical" };

describe("backup --keep-checkpoints and --since", () => {
  it("makes increments of any checkpoint that is kept, which restore the same as the chain", async () => {
    await using rig = await Rig.create();
    const { images } = await twoDisks(rig);
    const foreign = ["libvirt-cp", `tidemark-ffffffff-20200101T000000000Z-abcdef-11111111`];
    const { node } = await bitmapsOf(rig, images["vda"]!);
    for (const name of foreign) await rig.machine.monitor.execute("block-dirty-bitmap-add", { node, name });
    const keep = ["--keep-checkpoints", "3"];

    await change(rig, 1);
    const first = await rig.backup([...keep, "--name", "monday"]);
    await change(rig, 2);
    const second = await rig.backup(keep);
    await change(rig, 3);
    const third = await rig.backup(keep);
    // Nothing was written in between: both ways must come to the same bytes.
    const differential = await rig.backup([...keep, "--since", "monday"]);
    expect(summary(differential)).toEqual([
      ["vda", "incremental", first.id, null],
      ["vdb", "incremental", first.id, null],
    ]);
    expect(differential.parent).toBe(first.id);
    for (const point of [third, differential]) expect(await rig.verify(point, images)).toEqual(BOTH);
    for (const disk of ["vda", "vdb"]) {
      const [x, y] = [third, differential].map(({ id }) => rig.directory.file(`restored-${id}/${disk}.raw`));
      expect(await compareImages({ path: x!, format: "raw" }, { path: y!, format: "raw" })).toBe("identical");
    }

    // A full one disturbs no checkpoint; the oldest went, since three are kept.
    await change(rig, 4);
    const full = await rig.backup([...keep, "--full"]);
    const kept = [full.id, differential.id, third.id];
    const shown = await checkpointsOf(rig);
    expect(shown["vda"]?.filter(({ repository }) => repository !== "ffffffff").map(({ id }) => id)).toEqual(
      kept,
    );
    expect(shown["vdb"]?.map(({ id }) => id)).toEqual(kept);
    expect(shown["vdb"]?.map(({ dirtyBytes }) => dirtyBytes > 0)).toEqual([false, true, true]);
    expect(new Set(shown["vdb"]?.map(({ state }) => state))).toEqual(new Set(["recording"]));
    await change(rig, 5);
    const sinceThird = await rig.backup([...keep, "--since", third.id.slice(0, 18)]);
    expect(summary(sinceThird)).toEqual([
      ["vda", "incremental", third.id, null],
      ["vdb", "incremental", third.id, null],
    ]);
    expect(await rig.verify(sinceThird, images)).toEqual(BOTH);

    // One that is not kept any more costs reading, and the parent is the one that was asked for all the same.
    await change(rig, 6);
    const compared = await rig.backup(["--since", second.id]);
    const reason = `compared: checkpoint ${second.id} is not kept on this disk`;
    expect(summary(compared)).toEqual([
      ["vda", "incremental", second.id, reason],
      ["vdb", "incremental", second.id, reason],
    ]);
    expect(await rig.verify(compared, images)).toEqual(BOTH);
    for (const point of [first, second, full]) expect(await rig.verify(point, images)).toEqual(BOTH);

    // That one kept itself alone, and never touched what is not this repository's.
    expect((await idsOf(rig))["vdb"]).toEqual([compared.id]);
    const { names } = await bitmapsOf(rig, images["vda"]!);
    expect(names).toEqual(expect.arrayContaining(foreign));
    expect(names).toHaveLength(3);
  });

  it("decides disk by disk, keeps those of disks left out, and refuses when none can continue the point", async () => {
    await using rig = await Rig.create();
    const { images, start } = await twoDisks(rig);
    const keep = ["--keep-checkpoints", "2"];
    await change(rig, 1);
    const first = await rig.backup(["--disk", "vda", ...keep]);
    await change(rig, 2);
    const second = await rig.backup(keep);
    await change(rig, 3);
    const third = await rig.backup(keep);
    // Plain, and of one disk: the other one's checkpoints stay.
    const fourth = await rig.backup(["--disk", "vdb"]);
    expect(await idsOf(rig)).toEqual({ vda: [third.id, second.id], vdb: [fourth.id] });

    const before = await idsOf(rig);
    const refused = await rig.run([...rig.backupArguments(["--disk", "vdb", "--since", first.id])]);
    expect(refused.code).toBe(2);
    expect(refused.stdout).toContain(`point ${first.id} does not hold this disk`);
    expect(refused.stdout).toContain("Leave out --since");
    expect((await rig.run(rig.backupArguments(["--since", "nobody"]))).code).toBe(4);
    expect((await rig.run(rig.backupArguments(["--since", first.id, "--full"]))).code).toBe(2);
    expect((await rig.run(rig.backupArguments(["--keep-checkpoints", "17"]))).code).toBe(2);
    expect(await idsOf(rig)).toEqual(before);

    // A raw disk's checkpoints end with QEMU: it is compared, the other one goes by its bitmap, a third is not held.
    await rig.machine.quit();
    await start();
    await change(rig, 4);
    const mixed = await rig.backup(["--since", second.id]);
    expect(summary(mixed)).toEqual([
      ["vda", "incremental", second.id, null],
      ["vdb", "incremental", second.id, `compared: checkpoint ${second.id} is not kept on this disk`],
    ]);
    expect(await rig.verify(mixed, images)).toEqual(BOTH);
    await change(rig, 5);
    const partial = await rig.backup(["--since", first.id]);
    expect(summary(partial)).toEqual([
      ["vda", "incremental", first.id, `compared: checkpoint ${first.id} is not kept on this disk`],
      ["vdb", "full", null, `point ${first.id} does not hold this disk`],
    ]);
    expect(await rig.verify(partial, images)).toEqual(BOTH);
    const last = await rig.backup();
    expect(summary(last)).toEqual([
      ["vda", "incremental", partial.id, null],
      ["vdb", "incremental", partial.id, null],
    ]);
    expect(await rig.verify(last, images)).toEqual(BOTH);
  });

  it("works on a machine that is off, and goes on when it runs", async () => {
    await using rig = await Rig.create();
    const image = await rig.image("a.qcow2", "qcow2", 8 * MiB);
    const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `vda=${image}`];
    const points: PointView[] = [];
    const held: string[] = [];
    for (const [number, more] of [[], [], ["--since", "latest~1"]].entries()) {
      await qemuIo(image, "qcow2", [`write -P ${number + 1} ${number}M 100k`, `discard ${number}M 64k`]);
      points.push(pointOf((await rig.tidemark([...args, "--keep-checkpoints", "3", ...more])).events()));
      held.push(await toRaw(image, "qcow2", rig.directory.file(`held-${number}.raw`)));
    }
    const [first, second, third] = points;
    expect(third?.disks).toMatchObject([{ kind: "incremental", parent: first?.id, reason: null }]);
    for (const [number, point] of points.entries()) {
      const reference = { path: held[number]!, format: "raw" } as const;
      const bare = { path: `${rig.repository}/vm/${point.id}/vda.qcow2`, format: "qcow2" } as const;
      expect(await compareImages(bare, reference)).toBe("identical");
      const restored = { path: `${await rig.restore(point)}/vda.raw`, format: "raw" } as const;
      expect(await compareImages(restored, reference)).toBe("identical");
    }
    expect((await imageInfo(image))["format-specific"]?.data.bitmaps).toHaveLength(3);

    await rig.start([{ path: image, format: "qcow2", id: "vda" }], { guest: "none" });
    await rig.machine.qemuIoAll(0, ["write -P 9 5M 100k"]);
    const live = await rig.backup(["--since", second!.id, "--keep-checkpoints", "2"]);
    expect(live.disks).toMatchObject([{ kind: "incremental", parent: second?.id, reason: null }]);
    expect(await rig.verify(live, { vda: image })).toEqual({ vda: "identical" });
    expect(await idsOf(rig)).toEqual({ vda: [live.id, third?.id] });
  });

  it("starts from a checkpoint that is below an external snapshot", async () => {
    await using rig = await Rig.create();
    const { images } = await twoDisks(rig);
    const { vda, vdb } = images as { vda: string; vdb: string };
    const keep = ["--keep-checkpoints", "3"];
    await change(rig, 1);
    const first = await rig.backup(keep);
    await change(rig, 2);
    const second = await rig.backup(keep);
    const { node } = await bitmapsOf(rig, vda);
    const overlay = rig.directory.file("overlay.qcow2");
    await rig.machine.monitor.execute("blockdev-snapshot-sync", {
      ...{ "node-name": node, "snapshot-file": overlay, "snapshot-node-name": "overlay" },
    });
    await change(rig, 3);
    const third = await rig.backup(keep);
    await change(rig, 4);
    const differential = await rig.backup([...keep, "--since", first.id]);
    expect(summary(differential)).toEqual([
      ["vda", "incremental", first.id, null],
      ["vdb", "incremental", first.id, null],
    ]);
    for (const point of [third, differential])
      expect(await rig.verify(point, { vda: overlay, vdb })).toEqual(BOTH);
    // Those below cannot be removed there; above, the rule holds.
    expect(await idsOf(rig)).toEqual({
      vda: [differential.id, third.id, second.id, first.id],
      vdb: [differential.id, third.id, second.id],
    });
  });
});
