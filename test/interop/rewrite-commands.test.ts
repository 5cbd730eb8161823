import { createHash } from "node:crypto";
import { stat } from "node:fs/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { MiB } from "../../src/bytes/index.js";
import type { DiskManifest } from "../../src/repository/index.js";
import { tidemark, runTidemark, type CliResult } from "../support/cli.js";
import { usageOf } from "../support/qcow2-usage.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import {
  addPoints,
  CLUSTER,
  MACHINE,
  noise,
  pointsThatAreRight,
  pointTree,
  rawCopies,
  type PointTree,
  type Write,
} from "./rewrite-fixture.js";

let directory: TemporaryDirectory;
let root: string;

beforeEach(async () => {
  directory = await temporaryDirectory();
  root = directory.file("repository");
});

afterEach(async () => {
  await directory[Symbol.asyncDispose]();
});

const options = (): { env: Record<string, string> } => ({
  env: { TIDEMARK_REPO: root, TIDEMARK_RUNTIME_DIR: directory.path },
});

interface Result {
  readonly dryRun: boolean;
  readonly removed: readonly string[];
  readonly forgotten: readonly string[];
  readonly rewritten: readonly { copiedBytes: number; writtenBytes: number; baseBytes: number }[];
  readonly freedBytes: number;
}

async function change(...args: readonly string[]): Promise<Result> {
  const result = await tidemark([...args, "--json"], options());
  return result.events().at(-1) as unknown as Result;
}

function run(...args: readonly string[]): Promise<CliResult> {
  return runTidemark(args, options());
}

/** Bytes of all images. */
async function stored({ points, path }: PointTree): Promise<number> {
  const sizes = points.map((_, index) =>
    stat(path(index)).then(
      ({ size }) => size,
      () => 0,
    ),
  );
  return (await Promise.all(sizes)).reduce((sum, size) => sum + size, 0);
}

/** Clusters whose frames have any length: the beginning is noise, the rest zero. */
function uneven(first: number, count: number, step = 1, seed = first): Map<number, Buffer> {
  const content = (index: number): Buffer => {
    const digest = createHash("sha512").update(`${seed} ${index}`).digest();
    const bytes = Buffer.alloc(CLUSTER);
    const noisy = digest.readUInt16BE(0) % CLUSTER;
    noise(seed + index, CLUSTER)
      .values()
      .next()
      .value!.copy(bytes, 0, 0, noisy);
    digest.copy(bytes, CLUSTER - 64);
    return bytes;
  };
  return new Map(Array.from({ length: count }, (_, index) => [first + index * step, content(index)]));
}

describe("a dry run", () => {
  it("says what is then done: bytes that are copied and written, points that go, room that is freed", async () => {
    const writes: Write[] = [
      { data: uneven(0, 200) },
      { data: uneven(20, 40, 2) },
      { data: uneven(30, 60) },
      { data: uneven(70, 50, 3), parent: 1 },
      { data: uneven(10, 20), parent: 3 },
    ];
    const tree = await pointTree(root, 256 * CLUSTER, writes);
    const copies = await rawCopies(tree, directory.path);
    const at = (index: number): string => `${MACHINE}@${tree.points[index]!.id}`;
    const steps: readonly (readonly [args: readonly string[], left: readonly number[]])[] = [
      [
        ["flatten", at(2)],
        [0, 1, 2, 3, 4],
      ],
      [
        ["delete", at(3)],
        [0, 1, 2, 4],
      ],
      [
        ["delete", at(1)],
        [0, 2, 4],
      ],
      [
        ["compact", "--threshold", "0"],
        [0, 2, 4],
      ],
      [["prune", MACHINE, "--keep-last", "1"], [4]],
    ];
    let grown = 0;
    for (const [args, left] of steps) {
      const before = await stored(tree);
      const expected = await change(...args, "--dry-run");
      expect(await stored(tree)).toBe(before);
      const done = await change(...args);
      expect(done.removed).toEqual(expected.removed);
      expect(done.rewritten).toHaveLength(expected.rewritten.length);
      for (const [index, item] of done.rewritten.entries()) {
        const { copiedBytes, writtenBytes, ...rest } = expected.rewritten[index]!;
        expect(item).toMatchObject(rest);
        // A sector for each frame that is followed by none.
        const most = 512 * (args[0] === "compact" ? 80 : 60);
        expect(copiedBytes - item.copiedBytes, args.join(" ")).toBeGreaterThanOrEqual(0);
        expect(copiedBytes - item.copiedBytes, args.join(" ")).toBeLessThan(most);
        expect(Math.abs(writtenBytes - item.writtenBytes)).toBeLessThanOrEqual(CLUSTER);
      }
      expect(done.freedBytes).toBe(before - (await stored(tree)));
      expect(Math.abs(done.freedBytes - expected.freedBytes)).toBeLessThanOrEqual(
        CLUSTER * done.rewritten.length,
      );
      if (done.freedBytes < 0) grown += 1;
      expect(await pointsThatAreRight(tree, root, copies)).toEqual(left);
    }
    // A full that is made, at least, takes room, and is not passed over in silence.
    expect(grown).toBeGreaterThan(0);
  });
});

describe("garbageBytes", () => {
  it("is what nothing refers to, after merges in a row; compact removes it, and every point reads as before", async () => {
    const writes: Write[] = [{ data: uneven(0, 400) }];
    for (let index = 1; index < 7; index += 1) writes.push({ data: uneven(index * 37, 15, 1 + (index % 3)) });
    const tree = await pointTree(root, 512 * CLUSTER, writes);
    const copies = await rawCopies(tree, directory.path);
    let garbage = 0;
    const diskOf = async (index: number): Promise<DiskManifest> =>
      (await tree.repository.point(MACHINE, tree.points[index]!.id))!.disks[0]!;
    for (let index = 0; index < 5; index += 1) {
      await tidemark(["delete", `${MACHINE}@${tree.points[index]!.id}`], options());
      const { bytes, garbageBytes } = await diskOf(index + 1);
      const { length, frames, tables } = await usageOf(tree.path(index + 1));
      expect(length).toBe(bytes);
      const unused = length - frames - tables;
      // Less by the padding behind the frames that were appended, and by a sector wherever garbage follows a frame.
      expect(unused - garbageBytes).toBeGreaterThanOrEqual(0);
      expect(unused - garbageBytes).toBeLessThan(CLUSTER + 512 * 15 * (index + 1));
      expect(garbageBytes).toBeGreaterThan(garbage);
      garbage = garbageBytes;
    }
    expect(await change("compact", "--threshold", "99")).toMatchObject({ rewritten: [] });
    const text = await run("compact", `${MACHINE}@${tree.points[5]!.id}`, "--threshold", "1", "--dry-run");
    expect(text.stdout).toMatch(/would be written anew, .* moved\n.* less would be stored/);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([5, 6]);

    const { rewritten, freedBytes } = await change("compact", "--threshold", "1");
    expect(rewritten).toMatchObject([{ id: tree.points[5]!.id, baseBytes: 0 }]);
    expect(Math.abs(freedBytes - garbage)).toBeLessThan(2 * CLUSTER);
    const { length, frames, tables } = await usageOf(tree.path(5));
    expect(length - frames - tables).toBeLessThan(CLUSTER);
    expect(await diskOf(5)).toMatchObject({ garbageBytes: 0, kind: "full", bytes: length });
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([5, 6]);
    expect((await run("verify")).code).toBe(0);
  });
});

describe("prune of a full that several differentials need", () => {
  it("forgets it, since copies would take more room; it goes with all but one of them", async () => {
    const writes: Write[] = [{ data: noise(0, 4 * MiB) }];
    for (let index = 1; index < 5; index += 1) writes.push({ data: noise(index * 5, MiB / 2), parent: 0 });
    const tree = await pointTree(root, 6 * MiB, writes);
    const copies = await rawCopies(tree, directory.path);
    const full = tree.points[0]!.id;
    const before = await stored(tree);
    const text = await run("prune", MACHINE, "--keep-last", "3", "--dry-run");
    expect(text.stdout).toMatch(new RegExp(`${full} +remove +forgotten only: others need its images`));
    const { removed, forgotten, rewritten, freedBytes } = await change("prune", MACHINE, "--keep-last", "3");
    expect(removed).toEqual([full, tree.points[1]!.id]);
    expect({ forgotten, rewritten }).toEqual({ forgotten: [full], rewritten: [] });
    expect(freedBytes).toBe(before - (await stored(tree)));
    expect(freedBytes).toBeGreaterThan(0);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([0, 2, 3, 4]);
    expect((await run("show", `${MACHINE}@${full}`)).code).toBe(4);

    // Nothing changes until it is worth it.
    const again = await change("prune", MACHINE, "--keep-last", "3");
    expect(again).toMatchObject({ removed: [], forgotten: [], rewritten: [] });
    const last = await change("prune", MACHINE, "--keep-last", "1");
    expect(last).toMatchObject({ forgotten: [], rewritten: [{ id: tree.points[4]!.id }] });
    expect(last.removed).toContain(full);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([4]);
  });
});

describe("prune while a backup has a machine", () => {
  it("ends with 5 for that one alone; of several, the others are thinned out, and it ends with 3", async () => {
    const writes: Write[] = [{ data: noise(0, MiB) }, { data: noise(3, MiB) }];
    const tree = await pointTree(root, 2 * MiB, writes);
    await addPoints(tree.repository, 2 * MiB, writes, "other");
    const left = async (machine: string): Promise<number> => (await tree.repository.points(machine)).length;
    await using _lock = await tree.repository.lockMachine(MACHINE);
    const alone = await run("prune", MACHINE, "--keep-last", "1", "--json");
    expect(alone.code).toBe(5);
    expect(alone.events()).toMatchObject([{ event: "error", code: "TM_LOCKED", exitCode: 5 }]);
    const all = await run("prune", "--keep-last", "1", "--json");
    expect(all.code).toBe(3);
    expect(all.stderr).toContain(MACHINE);
    expect(all.events().at(-1)).toMatchObject({ event: "result", removed: [tree.points[0]!.id] });
    expect([await left(MACHINE), await left("other")]).toEqual([2, 1]);
    // Looking needs no lock.
    expect((await run("prune", "--keep-last", "1", "--dry-run")).code).toBe(0);
  });
});
