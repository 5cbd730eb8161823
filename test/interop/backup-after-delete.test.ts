import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { compareImages, imageInfo, qemuIo, toRaw } from "../support/image.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";

const MiB = 1024 * 1024;

let rig: Rig;
let image: string;
const held = (point: PointView): string => rig.directory.file(`held-${point.id}.raw`);

beforeEach(async () => {
  rig = await Rig.create();
  image = await rig.image("a.qcow2", "qcow2", 8 * MiB);
});

afterEach(async () => {
  await rig[Symbol.asyncDispose]();
});

/** Changes the image, backs it up without a machine, and keeps what it held. */
async function backUp(pattern: number, ...more: string[]): Promise<PointView> {
  await qemuIo(image, "qcow2", [
    `write -P ${pattern} ${pattern % 7}M 200k`,
    `discard ${(pattern + 3) % 7}M 64k`,
  ]);
  const args = ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `vda=${image}`];
  const point = pointOf((await rig.tidemark([...args, ...more])).events());
  await toRaw(image, "qcow2", held(point));
  return point;
}

async function expectRight(...points: PointView[]): Promise<void> {
  for (const point of points) {
    const reference = { path: held(point), format: "raw" } as const;
    const bare = { path: `${rig.repository}/vm/${point.id}/vda.qcow2`, format: "qcow2" } as const;
    expect(await compareImages(bare, reference)).toBe("identical");
    const restored = { path: `${await rig.restore(point)}/vda.raw`, format: "raw" } as const;
    expect(await compareImages(restored, reference)).toBe("identical");
  }
}

/** Ids of the checkpoints that the image carries, the newest first. */
async function checkpoints(): Promise<string[]> {
  const bitmaps = (await imageInfo(image))["format-specific"]?.data.bitmaps ?? [];
  return bitmaps
    .map(({ name }) => /^tidemark-[0-9a-f]{8}-(.*)-[0-9a-f]{8}$/.exec(name)?.[1] ?? name)
    .sort()
    .reverse();
}

const remove = (...args: string[]): Promise<unknown> =>
  rig.tidemark(["delete", ...args, "--repo", rig.repository]);

describe("backup after the current point was deleted", () => {
  it("compares with the point before, and takes the idle checkpoint away", async () => {
    const a = await backUp(1);
    const b = await backUp(2);
    const c = await backUp(3);
    const refused = await rig.run(["delete", "vm@latest", "--repo", rig.repository]);
    expect(refused).toMatchObject({ code: 2, stderr: expect.stringContaining("--force") as string });
    await remove("vm@latest", "--force");
    const next = await backUp(4);
    const reason = `compared: point ${c.id} is not in the repository`;
    expect(next.disks).toMatchObject([{ kind: "incremental", parent: b.id, reason }]);
    expect(next.parent).toBe(b.id);
    await expectRight(a, b, next);
    const last = await backUp(5);
    expect(last.disks).toMatchObject([{ kind: "incremental", parent: next.id, reason: null }]);
    await expectRight(last);
    expect(await checkpoints()).toEqual([last.id]);
  });

  it("goes on from an older checkpoint where one is kept", async () => {
    const keep = ["--keep-checkpoints", "2"];
    const a = await backUp(1, ...keep);
    const b = await backUp(2, ...keep);
    const c = await backUp(3, ...keep);
    expect(await checkpoints()).toEqual([c.id, b.id]);
    await remove("vm@latest", "--force");
    const next = await backUp(4, ...keep);
    expect(next.disks).toMatchObject([{ kind: "incremental", parent: b.id, reason: null }]);
    await expectRight(a, b, next);
    expect(await checkpoints()).toEqual([next.id, c.id, b.id]);
    // All are gone: nothing to continue, nothing to compare with.
    await remove(`vm@${a.id}`, "--children", "--force");
    const alone = await backUp(5, ...keep);
    expect(alone.disks).toMatchObject([{ kind: "full", parent: null }]);
    expect(alone.disks[0]?.reason).toContain("is not in the repository");
    await expectRight(alone);
    const last = await backUp(6, ...keep);
    expect(await checkpoints()).toEqual([last.id, alone.id]);
  });

  it("continues the images of one that was only forgotten, as long as they are there", async () => {
    const a = await backUp(1);
    const b = await backUp(2, "--name", "forgotten");
    const refused = await rig.run(["delete", "vm@forgotten", "--metadata-only", "--repo", rig.repository]);
    expect(refused).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("continue its images") as string,
    });
    await remove("vm@forgotten", "--metadata-only", "--force");
    const c = await backUp(3, "--name", "forgotten", "--keep-checkpoints", "2");
    expect(c.disks).toMatchObject([{ kind: "incremental", parent: b.id, reason: null }]);
    await expectRight(a, c);
    // Its checkpoint is kept like any other; but nobody can name it.
    expect(await checkpoints()).toEqual([c.id, b.id]);
    const since = [
      "backup",
      "--machine",
      "vm",
      "--repo",
      rig.repository,
      "--image",
      `vda=${image}`,
      "--since",
    ];
    expect((await rig.run([...since, b.id])).code).toBe(4);
    const before = await rig.tidemark(["show", "vm@latest~1", "--repo", rig.repository, "--json"]);
    expect((before.json() as PointView).id).toBe(a.id);

    // Deleting another one takes its images away, which move into their child; then it is as if it had never been.
    const d = await backUp(4);
    await remove(`vm@${c.id}`);
    await rig.tidemark(["prune", "vm", "--keep-last", "10", "--repo", rig.repository]);
    const e = await backUp(5);
    expect(e.disks).toMatchObject([{ kind: "incremental", parent: d.id, reason: null }]);
    await expectRight(a, d, e);

    // Forgotten, and thinned out before the next backup: that one compares.
    await remove("vm@latest", "--metadata-only", "--force");
    await rig.tidemark(["prune", "vm", "--keep-last", "10", "--repo", rig.repository]);
    const f = await backUp(6);
    const reason = `compared: point ${e.id} is not in the repository`;
    expect(f.disks).toMatchObject([{ kind: "incremental", parent: d.id, reason }]);
    await expectRight(a, d, f);
  });
});
