import { describe, expect, it } from "vitest";
import { DamageError } from "../../errors/index.js";
import { formatBitmapName } from "../../point/index.js";
import type { BackingImage, SourceBitmap, SourceDisk } from "../source.js";
import { checkpointsOf, type BaseContext, type CataloguePoint } from "./catalogue.js";
import { chooseBase, chooseBases } from "./choose.js";
import { bitmapsToRemove, bitmapsToRemoveAfter } from "./remove.js";

const REPOSITORY = "0a1b2c3d";
const TOKEN = "11111111";
const UUID = "6b9f0e0c-7f0e-4b52-9f0c-0c6a7ad1b0aa";

/** Checkpoint ids in order of time. */
function id(number: number): string {
  return `2026112${number}T000000000Z-abcdef`;
}

function bitmap(number: number, changes: Partial<SourceBitmap> = {}, token = TOKEN): SourceBitmap {
  return {
    name: formatBitmapName({ repository: REPOSITORY, checkpoint: id(number), token }),
    node: "node0",
    readOnly: false,
    granularity: 65536,
    recording: true,
    busy: false,
    persistent: true,
    inconsistent: false,
    dirtyBytes: 0,
    ...changes,
  };
}

function disk(bitmaps: readonly SourceBitmap[], changes: Partial<SourceDisk> = {}): SourceDisk {
  return {
    name: "vda",
    suggestedName: "vda",
    anonymous: false,
    qdev: "vda",
    deviceId: "vda",
    driveId: null,
    node: "node0",
    virtualSize: 1000,
    format: "qcow2",
    imageFile: "/images/a.qcow2",
    canPersist: true,
    imageClusterSize: 65536,
    bitmaps,
    backing: [],
    ...changes,
  };
}

function backing(node: string, changes: Partial<BackingImage> = {}): BackingImage {
  return { node, virtualSize: 1000, imageClusterSize: 65536, isFilter: false, ...changes };
}

function point(number: number, changes: Partial<CataloguePoint> = {}): CataloguePoint {
  return {
    id: id(number),
    machine: { uuid: UUID },
    disks: [{ name: "vda", token: TOKEN, virtualSize: 900, clusterSize: 65536 }],
    ...changes,
  };
}

function context(points: readonly CataloguePoint[], changes: Partial<BaseContext> = {}): BaseContext {
  return {
    repositoryTag: REPOSITORY,
    clusterSize: 65536,
    catalogue: (wanted) => Promise.resolve(points.find((item) => item.id === wanted)),
    machineUuid: UUID,
    points,
    ...changes,
  };
}

describe("chooseBase()", () => {
  it("takes the newest bitmap whose point the catalogue holds", async () => {
    const carried = disk([bitmap(1), bitmap(3), bitmap(2)]);
    expect(await chooseBase(carried, context([point(1), point(2)]))).toEqual({
      kind: "incremental",
      base: { node: "node0", name: bitmap(2).name },
      overlays: 0,
      checkpoint: id(2),
      token: TOKEN,
      parentDiskName: "vda",
      parentVirtualSize: 900,
    });
  });

  it.each([
    ["first backup of this disk", disk([]), context([])],
    [
      "checkpoint bitmap missing (raw disk, QEMU restarted)",
      disk([], { canPersist: false, format: "raw" }),
      context([point(1)]),
    ],
    [
      "checkpoint bitmap missing (disk replaced, or QEMU was killed before it was stored)",
      disk([]),
      context([point(1)]),
    ],
    [
      "bitmap inconsistent: QEMU did not shut down cleanly",
      disk([bitmap(1, { inconsistent: true, recording: false })]),
      context([point(1)]),
    ],
    [
      "bitmap granularity is 32768, 65536 is needed",
      disk([bitmap(1, { granularity: 32768 })]),
      context([point(1)]),
    ],
    [
      `point ${id(1)} uses clusters of 262144, not of 65536`,
      disk([bitmap(1)]),
      context([point(1, { disks: [{ name: "vda", token: TOKEN, virtualSize: 900, clusterSize: 262144 }] })]),
    ],
    ["bitmap does not record", disk([bitmap(1, { recording: false })]), context([point(1)])],
    ["bitmap is in use by another program", disk([bitmap(1, { busy: true })]), context([point(1)])],
    [
      "bitmap is on a backing image: an external snapshot was taken since, and the disk resized",
      disk([bitmap(1, { readOnly: true, node: "below" })], {
        backing: [backing("below", { virtualSize: 999 })],
      }),
      context([point(1)]),
    ],
    [
      "bitmap is on a backing image, with a filter on top of it",
      disk([bitmap(1, { readOnly: true, node: "below" })], {
        backing: [backing("filter", { isFilter: true }), backing("below")],
      }),
      context([point(1)]),
    ],
    [
      "bitmap inconsistent: QEMU did not shut down cleanly",
      disk([bitmap(1, { readOnly: true, node: "below", inconsistent: true })], {
        backing: [backing("below")],
      }),
      context([point(1)]),
    ],
    [
      "machine was migrated away and came back (snapshots were taken: its bitmap knows nothing of that time)",
      disk([bitmap(1, { readOnly: true, node: "below" })], { backing: [backing("below")] }),
      context([point(1)], { machineWasAway: true }),
    ],
    [`point ${id(1)} is not in the repository`, disk([bitmap(1)]), context([])],
    [
      `point ${id(1)} belongs to another machine`,
      disk([bitmap(1)]),
      context([point(1, { machine: { uuid: "00000000-0000-4000-8000-000000000001" } })]),
    ],
    [
      `point ${id(1)} holds no disk with token 22222222`,
      disk([bitmap(1, {}, "22222222")]),
      context([point(1)]),
    ],
    [
      "machine was migrated away and came back (raw disk: its bitmap knows nothing of that time)",
      disk([bitmap(1, { persistent: false })], { canPersist: false, format: "raw" }),
      context([point(1)], { machineWasAway: true }),
    ],
  ])("goes full: %s", async (reason, carried, judged) => {
    expect(await chooseBase(carried, judged)).toMatchObject({ kind: "full", reason });
  });

  it("goes on with a bitmap that is stored in the image after the machine was migrated away and came back", async () => {
    const judged = context([point(1)], { machineWasAway: true });
    expect(await chooseBase(disk([bitmap(1)]), judged)).toMatchObject({ kind: "incremental" });
  });

  it("goes on with a bitmap on a backing image, and counts the images on top of it", async () => {
    const overlaid = disk([bitmap(1, { readOnly: true, node: "below" })], {
      node: "top",
      backing: [backing("middle", { virtualSize: 7 }), backing("below", { imageClusterSize: 4096 })],
    });
    expect(await chooseBase(overlaid, context([point(1)]))).toMatchObject({
      kind: "incremental",
      base: { node: "below", name: bitmap(1).name },
      overlays: 2,
    });
  });

  it("gives the reason of what belongs to this machine, not of what another one left on the disk", async () => {
    // Another machine's name in the same repository: this catalogue has neither its points nor its tokens.
    const strange = bitmap(2, {}, "22222222");
    const lost = disk([strange, bitmap(1, { inconsistent: true })]);
    const reasonOf = async (carried: SourceDisk, judged: BaseContext): Promise<unknown> => {
      const choice = await chooseBase(carried, judged);
      return choice.kind === "full" ? choice.reason : choice.kind;
    };
    expect(await reasonOf(lost, context([point(1)]))).toContain("inconsistent");
    expect(await reasonOf(disk([strange]), context([point(1)]))).toContain("bitmap missing");
    // A point of this machine that was deleted.
    expect(await reasonOf(disk([bitmap(2)]), context([point(1)]))).toContain("is not in the repository");
  });

  it("keeps the disk's token when the chain goes on with a full", async () => {
    const broken = disk([bitmap(1, { inconsistent: true })]);
    expect(await chooseBase(broken, context([point(1)]))).toMatchObject({ kind: "full", token: TOKEN });
    expect(await chooseBase(disk([bitmap(1)]), context([]))).toMatchObject({ token: undefined });
  });

  it("goes on from an older bitmap when the newest is broken", async () => {
    const carried = disk([bitmap(2, { inconsistent: true }), bitmap(1)]);
    expect(await chooseBase(carried, context([point(1), point(2)]))).toMatchObject({
      kind: "incremental",
      checkpoint: id(1),
    });
  });

  it("takes no other checkpoint than the one that it is to start from, and says why not", async () => {
    const points = [point(1), point(2), point(3)];
    const since = (number: number, carried: SourceDisk, more: Partial<BaseContext> = {}) =>
      chooseBase(carried, context(points, { since: id(number), ...more }));
    const all = disk([bitmap(1), bitmap(2), bitmap(3)]);
    expect(await since(2, all)).toMatchObject({ kind: "incremental", checkpoint: id(2), token: TOKEN });
    expect(await since(2, disk([bitmap(1), bitmap(3)]))).toEqual({
      kind: "full",
      reason: `checkpoint ${id(2)} is not kept on this disk`,
      token: TOKEN,
    });
    expect(await since(2, disk([bitmap(2, { inconsistent: true }), bitmap(3)]))).toMatchObject({
      kind: "full",
      reason: "bitmap inconsistent: QEMU did not shut down cleanly",
      token: TOKEN,
    });
    expect(await since(2, disk([]))).toMatchObject({ kind: "full", token: undefined });
  });

  it("passes over bitmaps of other repositories and other programs", async () => {
    const other = formatBitmapName({ repository: "ffffffff", checkpoint: id(2), token: TOKEN });
    const carried = disk([bitmap(2, { name: other }), bitmap(3, { name: "libvirt-cp" }), bitmap(1)]);
    expect(await chooseBase(carried, context([point(1), point(2)]))).toMatchObject({ checkpoint: id(1) });
  });

  it("throws what the catalogue throws: an error is not an absence", async () => {
    const failing = context([], { catalogue: () => Promise.reject(new Error("EIO")) });
    await expect(chooseBase(disk([bitmap(1)]), failing)).rejects.toThrow("EIO");
  });

  it("cannot tell machines without a uuid apart, and does not try to", async () => {
    const judged = context([point(1, { machine: { uuid: null } })]);
    expect(await chooseBase(disk([bitmap(1)]), judged)).toMatchObject({ kind: "incremental" });
  });
});

describe("chooseBases()", () => {
  it("lets the parent's namesake go on when an image was copied, else the first", async () => {
    const [copy, original] = [disk([bitmap(1)], { name: "vdb" }), disk([bitmap(1)])];
    const choices = await chooseBases([copy, original], context([point(1)]));
    expect(choices.get(original)).toMatchObject({ kind: "incremental" });
    expect(choices.get(copy)).toEqual({
      kind: "full",
      reason: "carries the same checkpoint as disk vda: a copied image",
    });
    const [first, second] = [disk([bitmap(1)], { name: "x" }), disk([bitmap(1)], { name: "y" })];
    const others = await chooseBases([first, second], context([point(1)]));
    expect([...others.values()].map(({ kind }) => kind)).toEqual(["incremental", "full"]);
  });

  it("lets one of two disks go on that have one image below them", async () => {
    const overlay = (name: string, node: string): SourceDisk =>
      disk([bitmap(1, { readOnly: true, node: "below" })], { name, node, backing: [backing("below")] });
    const [clone, own] = [overlay("vdb", "top1"), overlay("vda", "top2")];
    const choices = await chooseBases([clone, own], context([point(1)]));
    expect(choices.get(own)).toMatchObject({ kind: "incremental", overlays: 1 });
    expect(choices.get(clone)).toEqual({
      kind: "full",
      reason: "carries the same checkpoint as disk vda: a copied image",
    });
  });

  it("calls a disk new when the one that had its name is here under another, lost when it is nowhere", async () => {
    const [added, moved] = [disk([]), disk([bitmap(1)], { name: "vdb" })];
    const both = await chooseBases([added, moved], context([point(1)]));
    expect(both.get(added)).toEqual({ kind: "full", reason: "first backup of this disk" });
    expect(both.get(moved)).toMatchObject({ kind: "incremental" });
    const alone = await chooseBases([added], context([point(1), point(2, { disks: [] })]));
    expect(alone.get(added)).toMatchObject({ reason: expect.stringContaining("bitmap missing") as string });
  });
});

describe("checkpointsOf()", () => {
  it("looks for a point under all other names, and takes one that cannot be read for it", async () => {
    const source = (machines: Record<string, CataloguePoint | Error | undefined>) =>
      checkpointsOf(
        {
          id: `${REPOSITORY}-0000-4000-8000-000000000000`,
          machines: () => Promise.resolve(Object.keys(machines)),
          point: (machine) => {
            const found = machines[machine];
            return found instanceof Error ? Promise.reject(found) : Promise.resolve(found);
          },
        },
        "vm",
      );
    const isElsewhere = async (machines: Record<string, CataloguePoint | Error | undefined>) =>
      await source(machines).isElsewhere?.(id(1));
    expect(await isElsewhere({ vm: point(1), db: undefined })).toBe(false);
    expect(await isElsewhere({ vm: undefined, db: undefined, web: point(1) })).toBe(true);
    const damage = new DamageError("TM_X", "damaged", { object: "x" });
    expect(await isElsewhere({ db: damage })).toBe(true);
    await expect(isElsewhere({ db: new Error("EIO") })).rejects.toThrow("EIO");
  });
});

describe("bitmapsToRemove()", () => {
  const removed = async (carried: SourceDisk, judged: Parameters<typeof bitmapsToRemove>[1]) =>
    (await bitmapsToRemove(carried, judged)).map(({ name, why }) => [name, why]);

  it("removes what is older than the newest committed checkpoint, and uncommitted ones before it", async () => {
    const carried = disk([bitmap(1), bitmap(2), bitmap(3), bitmap(4)]);
    expect(await removed(carried, context([point(1), point(3)]))).toEqual([
      [bitmap(2).name, "uncommitted"],
      [bitmap(1).name, "old"],
    ]);
  });

  it("removes nothing without a newer committed checkpoint", async () => {
    expect(await removed(disk([bitmap(1), bitmap(2)]), context([]))).toEqual([]);
    expect(await removed(disk([bitmap(1), bitmap(2)]), context([point(1)]))).toEqual([]);
    expect(await removed(disk([bitmap(1)]), context([point(1), point(2)]))).toEqual([]);
  });

  it.each([
    ["is inconsistent", { inconsistent: true }],
    ["does not record", { recording: false }],
    ["is on a read-only node", { readOnly: true }],
  ])("removes nothing when the newer one's own bitmap %s", async (_what, fault) => {
    const carried = disk([bitmap(1), bitmap(2, fault)]);
    expect(await removed(carried, context([point(1), point(2)]))).toEqual([]);
  });

  it("removes the checkpoint of the disk that a disk was copied from, when it has its own", async () => {
    const copied = disk([bitmap(1), bitmap(2, {}, "22222222")]);
    const other = point(2, { disks: [{ name: "x", token: "22222222", virtualSize: 1, clusterSize: 65536 }] });
    expect(await removed(copied, context([point(1), other]))).toEqual([[bitmap(1).name, "old"]]);
    // Its own point is not there: it may be another machine's in the same repository, unless none has it.
    const elsewhere = (isElsewhere: boolean) =>
      context([other], { isElsewhere: () => Promise.resolve(isElsewhere) });
    expect(await removed(copied, context([other]))).toEqual([]);
    expect(await removed(copied, elsewhere(true))).toEqual([]);
    expect(await removed(copied, elsewhere(false))).toEqual([[bitmap(1).name, "uncommitted"]]);
    // Not even then without a newer one of this machine.
    expect(await removed(disk([bitmap(1)]), elsewhere(false))).toEqual([]);
  });

  it("does not count another machine's point", async () => {
    const foreign = point(2, { machine: { uuid: "00000000-0000-4000-8000-000000000001" } });
    expect(await removed(disk([bitmap(1), bitmap(2)]), context([point(1), foreign]))).toEqual([]);
  });

  it("leaves bitmaps that cannot be removed now, and those of others", async () => {
    const carried = disk([
      bitmap(1, { readOnly: true }),
      bitmap(2, { busy: true }),
      bitmap(3, { name: "libvirt-cp" }),
      bitmap(4),
    ]);
    expect(await removed(carried, context([point(1), point(2), point(4)]))).toEqual([]);
  });

  it("keeps as many checkpoints as the newest point says, whatever older ones say", async () => {
    const carried = disk([bitmap(1), bitmap(2), bitmap(3), bitmap(4)]);
    const saying = (...keep: (number | undefined)[]) =>
      removed(carried, context(keep.map((keepCheckpoints, index) => point(index + 1, { keepCheckpoints }))));
    const old = (...numbers: number[]) => numbers.map((number) => [bitmap(number).name, "old"]);
    expect(await saying(1, 1, 1, 2)).toEqual(old(2, 1));
    expect(await saying(16, 16, 16, 3)).toEqual(old(1));
    expect(await saying(16, 16, 16, undefined)).toEqual(old(3, 2, 1));
    expect(await saying(1, 1, 1, 16)).toEqual([]);
    // The newest one was never committed, or its point was deleted: the one before it says.
    expect(await saying(1, 1, 2)).toEqual(old(1));
  });

  it("counts only what is sound and of the chain; what is not goes as soon as something newer is", async () => {
    const keep = (number: number, disks?: CataloguePoint["disks"]): CataloguePoint =>
      point(number, { keepCheckpoints: 3, ...(disks && { disks }) });
    const broken = disk([bitmap(1), bitmap(2, { inconsistent: true }), bitmap(3), bitmap(4)]);
    const points = [keep(1), keep(2), keep(3), keep(4)];
    expect(await removed(broken, context(points))).toEqual([[bitmap(2).name, "old"]]);
    const copied = disk([bitmap(1), bitmap(2), bitmap(3, {}, "22222222")]);
    const other = keep(3, [{ name: "x", token: "22222222", virtualSize: 1, clusterSize: 65536 }]);
    expect(await removed(copied, context([keep(1), keep(2), other]))).toEqual([
      [bitmap(2).name, "old"],
      [bitmap(1).name, "old"],
    ]);
    // A kept checkpoint whose point was deleted serves nobody.
    expect(await removed(disk([bitmap(1), bitmap(2)]), context([keep(2)]))).toEqual([
      [bitmap(1).name, "uncommitted"],
    ]);
  });

  it("keeps the checkpoint that the run starts from", async () => {
    const carried = disk([bitmap(1), bitmap(2), bitmap(3)]);
    const judged = { ...context([point(1), point(2), point(3)]), needed: id(1) };
    expect(await removed(carried, judged)).toEqual([[bitmap(2).name, "old"]]);
  });

  it("judges a disk that was frozen with the checkpoint that it got", async () => {
    const frozen = { disk: disk([bitmap(1), bitmap(2)]), bitmap: bitmap(3).name };
    const after = async (...points: CataloguePoint[]) =>
      (await bitmapsToRemoveAfter(frozen, context(points))).map(({ name }) => name);
    expect(await after(point(1), point(2), point(3))).toEqual([bitmap(2).name, bitmap(1).name]);
    expect(await after(point(1), point(2), point(3, { keepCheckpoints: 2 }))).toEqual([bitmap(1).name]);
    expect(await after(point(1), point(2))).toEqual([bitmap(1).name]);
    // What no point is known of is left to the next recovery.
    expect(await after(point(1), point(3))).toEqual([bitmap(1).name]);
  });

  it("throws what the catalogue throws, and removes nothing", async () => {
    let asked = 0;
    const catalogue = (wanted: string): Promise<CataloguePoint | undefined> => {
      asked += 1;
      return asked === 3 ? Promise.reject(new Error("EIO")) : Promise.resolve(point(Number(wanted[7])));
    };
    const carried = disk([bitmap(1), bitmap(2), bitmap(3)]);
    await expect(removed(carried, context([], { catalogue }))).rejects.toThrow("EIO");
  });
});
