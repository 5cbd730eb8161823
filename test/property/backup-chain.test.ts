import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { GiB, KiB, MiB } from "../../src/bytes/index.js";
import { checkImage, CLEAN, createImage, writeNoise } from "../support/image.js";
import type { TestDisk, TestMachine } from "../support/qemu.js";
import { fraction } from "../support/seed.js";
import { Rig, type PointView } from "../support/rig.js";

/** Chains in all. A soak run sets it higher. */
const RUNS = Number(process.env["TIDEMARK_CHAIN_RUNS"] ?? 6);
/** To see a failure again: the seed that its report names. */
const SEED = Number(process.env["TIDEMARK_CHAIN_SEED"] ?? Date.now() % GiB);
/** Milliseconds that the longest chain may take on a slow machine. */
const RUN_DEADLINE = 180_000;

const SECTOR = 512;
const CLUSTER = 64 * KiB;
/** The longest range that one command touches. */
const LONGEST = 4 * CLUSTER;

/** What becomes of a range of a disk; a cut takes off all from there on, and the disk grows back; a resize stays. */
const KINDS = ["fill", "noise", "zero", "unmap", "discard", "cut", "resize"] as const;

/**
 * How a point is made: by the bitmaps, by comparing all disks, after their bitmaps were lost, or as a differential of the
 * oldest point whose checkpoint is kept (of the very first where none is).
 */
const WAYS = ["plain", "plain", "compare", "lost", "since", "since"] as const;

/** Checkpoints that stay in the machine. */
const KEPT = 3;

/** Clusters of a qcow2 disk: smaller than the backup's, as large, and larger. */
const CLUSTER_SIZES = ["4k", "16k", "64k", "256k"] as const;

/** One command on one disk; the disk's shape turns fractions into sectors. */
interface Change {
  readonly kind: (typeof KINDS)[number];
  /** 0 to 1: where the range is. */
  readonly place: number;
  readonly length: number;
  /** Whether it begins at the border of a cluster, ends at the disk's end, or lies anywhere. */
  readonly at: "cluster" | "end" | "anywhere";
  readonly byte: number;
}

interface Plan {
  readonly sectors: readonly [number, number, number];
  /** Bytes per cluster of the second qcow2 disk: smaller and larger than the backup's are worth trying. */
  readonly clusterSize: (typeof CLUSTER_SIZES)[number];
  /** Changes before each point, by disk: the first point is a full one. */
  readonly steps: readonly (readonly [
    (typeof WAYS)[number],
    readonly Change[],
    readonly Change[],
    readonly Change[],
  ])[];
}

const change: fc.Arbitrary<Change> = fc.record({
  // Few cuts: they take away what the others made.
  kind: fc.oneof(
    { weight: 20, arbitrary: fc.constantFrom(...KINDS) },
    {
      weight: 60,
      arbitrary: fc.constantFrom(...KINDS.filter((kind) => kind !== "cut" && kind !== "resize")),
    },
  ),
  place: fraction,
  length: fc.oneof(
    fc.integer({ min: 1, max: LONGEST / SECTOR }).map((sectors) => sectors * SECTOR),
    fc.constantFrom(SECTOR, 4 * KiB, CLUSTER - SECTOR, CLUSTER, CLUSTER + SECTOR, 2 * CLUSTER, LONGEST),
  ),
  at: fc.constantFrom("cluster", "anywhere", "anywhere", "end"),
  byte: fc.oneof(
    { weight: 9, arbitrary: fc.integer({ min: 1, max: 255 }) },
    { weight: 1, arbitrary: fc.constant(0) },
  ),
});

const changes = fc.array(change, { maxLength: 10, size: "max" });

const plan: fc.Arbitrary<Plan> = fc.record({
  // Never a multiple of the cluster, then always, then either.
  sectors: fc.tuple(
    fc.integer({ min: 0, max: 63 }).map((odd) => (3 * MiB) / SECTOR + 2 * odd + 1),
    fc.integer({ min: 16, max: 64 }).map((clusters) => (clusters * CLUSTER) / SECTOR),
    fc.integer({ min: 1, max: (4 * MiB) / SECTOR }),
  ),
  clusterSize: fc.constantFrom(...CLUSTER_SIZES),
  steps: fc.array(fc.tuple(fc.constantFrom(...WAYS), changes, changes, changes), {
    minLength: 2,
    maxLength: 13,
    size: "max",
  }),
});

/** Where a change of a disk of `size` bytes is. */
function rangeOf({ place, length, at }: Change, size: number): { offset: number; length: number } {
  const usable = Math.min(length, size);
  const free = size - usable;
  const unit = at === "cluster" ? CLUSTER : SECTOR;
  return { offset: at === "end" ? free : Math.floor((place * free) / unit) * unit, length: usable };
}

/** Makes a change through the disk's device. @returns the disk's size from then on */
async function apply(
  change: Change,
  machine: TestMachine,
  disk: number,
  size: number,
  noise: string,
): Promise<number> {
  const { offset, length } = rangeOf(change, size);
  const range = `${offset} ${length}`;
  const resize = async (to: number): Promise<void> => {
    await machine.monitor.execute("block_resize", { "node-name": machine.disks[disk]?.node, size: to });
  };
  switch (change.kind) {
    case "fill":
      await machine.qemuIo(disk, `write -P ${change.byte} ${range}`);
      return size;
    case "noise":
      await machine.qemuIo(disk, `write -s ${noise} ${range}`);
      return size;
    case "zero":
      await machine.qemuIo(disk, `write -z ${range}`);
      return size;
    case "unmap":
      await machine.qemuIo(disk, `write -z -u ${range}`);
      return size;
    case "discard":
      await machine.qemuIo(disk, `discard ${range}`);
      return size;
    case "cut":
      await resize(Math.max(offset, SECTOR));
      await resize(size);
      return size;
    case "resize": {
      // Smaller, or larger by what a command touches at most.
      const to = change.byte % 2 === 0 ? Math.max(offset, SECTOR) : size + length;
      await resize(to);
      return to;
    }
  }
}

/** Takes our bitmaps away from all disks. */
async function loseBitmaps(machine: TestMachine): Promise<void> {
  type Node = {
    readonly "node-name": string;
    readonly "dirty-bitmaps"?: readonly { readonly name: string }[];
  };
  const nodes = await machine.monitor.execute<Node[]>("query-named-block-nodes");
  const bitmaps = nodes.flatMap(({ "node-name": node, "dirty-bitmaps": found = [] }) =>
    found.map(({ name }) => ({ node, name })),
  );
  expect(bitmaps.length).toBeGreaterThan(0);
  for (const bitmap of bitmaps) await machine.monitor.execute("block-dirty-bitmap-remove", bitmap);
}

/** Makes the disks, takes a point after each step, and looks at all points when the last one is there. */
async function backUp({ sectors, clusterSize, steps }: Plan): Promise<void> {
  await using rig = await Rig.create();
  const noise = await writeNoise(rig.directory.file("noise"), LONGEST, sectors[2]);
  const sizes = sectors.map((count) => count * SECTOR);
  const [one = 0, two = 0, three = 0] = sizes;
  const create = { create: { cluster_size: clusterSize } };
  const disks: TestDisk[] = [
    { path: await rig.image("one.qcow2", "qcow2", one), format: "qcow2" },
    { path: await createImage(rig.directory.file("two.qcow2"), "qcow2", two, create), format: "qcow2" },
    { path: await rig.image("three.raw", "raw", three), format: "raw" },
  ];
  const machine = await rig.start(disks, { guest: "none", deadline: RUN_DEADLINE });

  const points: PointView[] = [];
  let kept: string[] = [];
  for (const [number, [way, ...step]] of steps.entries()) {
    for (const [disk, list] of step.entries()) {
      for (const item of list) sizes[disk] = await apply(item, machine, disk, sizes[disk] ?? 0, noise);
    }
    const isFirst = number === 0;
    if (way === "lost" && !isFirst) await loseBitmaps(machine);
    if (way === "lost") kept = [];
    const since = kept[0] ?? points[0]?.id;
    const parent = way === "since" ? since : points.at(-1)?.id;
    const isByBitmap = way === "plain" || (way === "since" && kept.length > 0);
    const how = {
      plain: [],
      lost: [],
      compare: ["--compare"],
      since: since === undefined ? [] : ["--since", since],
    };
    const point = await rig.backup([...how[way], "--keep-checkpoints", String(KEPT)]);
    kept = [...kept, point.id].slice(-KEPT);
    for (const { kind, reason, virtualSize, name, ...disk } of point.disks) {
      expect(disk.parent ?? undefined).toBe(parent);
      expect(kind).toBe(isFirst ? "full" : "incremental");
      expect(virtualSize).toBe(sizes[Number(name.slice(2))]);
      if (!isFirst) expect(reason?.slice(0, 9)).toBe(isByBitmap ? undefined : "compared:");
    }
    points.push(point);
  }

  const images = Object.fromEntries(disks.map(({ path }, index) => [`vd${index}`, path]));
  const identical = Object.fromEntries(disks.map((_disk, index) => [`vd${index}`, "identical"]));
  for (const [number, point] of points.entries()) {
    expect(await rig.verify(point, images), `point ${number} of ${points.length}`).toEqual(identical);
    for (const { image } of point.disks) {
      const { report, ...found } = await checkImage(`${rig.repository}/vm/${point.id}/${image}`);
      expect(found, report).toEqual(CLEAN);
    }
  }
}

describe("backup and restore", () => {
  it(
    "agree with the machine at every point of random chains, in tidemark's restore and in qemu-img's",
    async () => {
      // Chains take seconds: a failing one is reported as it is, with its seed, and not shortened.
      await fc.assert(fc.asyncProperty(plan, backUp), {
        numRuns: RUNS,
        seed: SEED,
        endOnFailure: true,
      });
    },
    RUNS * RUN_DEADLINE,
  );
});
