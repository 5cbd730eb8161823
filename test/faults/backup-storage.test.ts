import { rm } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { backup } from "../../src/backup/index.js";
import { TidemarkError } from "../../src/errors/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import { openRepository, type PointManifest } from "../../src/repository/index.js";
import { LocalStorage, type Storage } from "../../src/storage/index.js";
import { NOTHING, residueOf } from "../interop/machine-fixture.js";
import { FaultyStorage, type StorageFault, type StorageOperation } from "../support/faulty-storage.js";
import { compareImages, writeNoise } from "../support/image.js";
import { Rig } from "../support/rig.js";
import { isLong } from "./guard-fixture.js";

const MiB = 1024 * 1024;

let rig: Rig;
let images: Record<string, string>;
let storage: LocalStorage;
let newest: PointManifest;
let seed = 0;

/** Backs the machine up within this process: what stands in for the storage is an object. */
async function backUp(onto: Storage, warnings: string[] = [], signal?: AbortSignal): Promise<PointManifest> {
  return await backup({
    repository: await openRepository(onto),
    machine: "vm",
    source: {
      kind: "live",
      address: parseQmpAddress(rig.proxy.socket),
      runDirectory: rig.directory.file("run"),
      guard: false,
    },
    workers: 1,
    tidemarkVersion: "0.0.0",
    signal,
    observer: { warning: (text) => warnings.push(text) },
  });
}

/** What bare qemu-img reads from the repository is what the machine's disks held at the freeze. */
async function expectRight(point: PointManifest): Promise<void> {
  const freeze = rig.proxy.freezeOf(point.id);
  for (const [disk, image] of Object.entries(images)) {
    const reference = { path: rig.proxy.referenceOf(image, freeze), format: "raw" } as const;
    const stored = { path: `${rig.repository}/vm/${point.id}/${disk}.qcow2`, format: "qcow2" } as const;
    expect(await compareImages(stored, reference)).toBe("identical");
  }
}

async function pointsOf(onto: Storage): Promise<readonly string[]> {
  const { points, unreadable } = await (await openRepository(onto)).survey("vm");
  expect(unreadable).toEqual([]);
  return points.map(({ id }) => id);
}

/** The next backup needs nobody's help, goes on from the newest point that is stored, and is right. */
async function expectNextRight(): Promise<void> {
  const parent = (await pointsOf(storage)).at(-1);
  const warnings: string[] = [];
  newest = await backUp(storage, warnings);
  expect(warnings).toEqual([]);
  expect(newest.parent).toBe(parent);
  expect(newest.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental"]);
  await expectRight(newest);
  expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
}

beforeAll(async () => {
  rig = await Rig.create();
  const vda = await rig.image("a.qcow2", "qcow2", 8 * MiB);
  const vdb = await rig.image("b.raw", "raw", 2 * MiB);
  images = { vda, vdb };
  await rig.start(
    [
      { path: vda, format: "qcow2", id: "vda" },
      { path: vdb, format: "raw", id: "vdb" },
    ],
    { guest: "none", deadline: 1_200_000 },
  );
  storage = await LocalStorage.open(rig.repository);
  newest = await backUp(storage);
}, 60_000);

afterAll(async () => {
  await rig[Symbol.asyncDispose]();
});

beforeEach(async () => {
  seed += 1;
  const noise = await writeNoise(rig.directory.file("noise"), MiB, seed);
  await rig.machine.qemuIo("vda", `write -s ${noise} ${1 + (seed % 6)}M 1M`);
  await rig.machine.qemuIo("vdb", `write -P ${(seed % 255) + 1} 64k 128k`);
});

const MANIFEST = /point\.json$/;

interface Case extends StorageFault {
  /** Code of the error that the backup ends with; "point" where it is no less a backup. */
  readonly ends: string;
}

/** An error that is only passed on. */
const failing = (operation: StorageOperation, nth: number, how: StorageFault["how"] = "error"): Case => ({
  ...{ operation, nth, how },
  ends: "TM_STORAGE_IO",
});

/** At least one of each operation; what comes after the point is written matters most. */
const CASES: readonly Case[] = [
  failing("create", 2),
  failing("append", 1),
  failing("commit", 2, "lost answer"),
  failing("open", 1),
  failing("read", 3),
  failing("get", 2),
  failing("listFolders", 1),
  failing("discardLeftovers", 1),
  failing("put", 1, "lost answer"),
  failing("put", 2),
  failing("put", 2, "lost answer"),
  { ...failing("get", 1), after: MANIFEST },
  { ...failing("open", 1), after: MANIFEST },
  { ...failing("append", 1, "short"), ends: "TM_POINT_IMAGE_DAMAGED" },
  { ...failing("put", 2, "short"), ends: "TM_MANIFEST_TORN" },
  // Giving the lock back: the point stands.
  { ...failing("delete", 1), ends: "point" },
];

/** For the long version: every one of them, in an increment like the others. */
const ALL_OF: Readonly<Partial<Record<StorageOperation, number>>> = {
  create: 4,
  append: 6,
  commit: 4,
  open: 8,
  read: 30,
  get: 12,
  listFolders: 2,
};

const MORE: readonly Case[] = [
  ...Object.entries(ALL_OF).flatMap(([operation, count]) =>
    Array.from({ length: count }, (_, index) => failing(operation as StorageOperation, index + 1)),
  ),
  ...[2, 3, 4, 5].map((nth) => ({ ...failing("get", nth), after: MANIFEST })),
  { ...failing("append", 2, "short"), ends: "TM_POINT_IMAGE_DAMAGED" },
  ...[1, 2, 3].map((nth) => failing("append", nth, "lost answer")),
];

describe("backup() on a storage that fails", () => {
  const cases = (isLong ? [...CASES, ...MORE] : CASES).map((one) => ({
    ...one,
    where: `${one.operation} ${one.nth}${one.after === undefined ? "" : " after the manifest"}`,
  }));

  it.each(cases)(
    "at $where, $how: ends in order with $ends, and the next increment is right",
    async ({ ends, where: _where, ...fault }) => {
      const faulty = new FaultyStorage(storage);
      const armed = faulty.arm(fault);
      const warnings: string[] = [];
      const outcome = await backUp(faulty, warnings).catch((error: unknown) => error);
      expect(armed.fired).toBe(1);
      if (ends === "point") await expectRight(outcome as PointManifest);
      else {
        expect(outcome).toBeInstanceOf(TidemarkError);
        expect(outcome).toMatchObject({ code: ends });
      }
      expect(warnings).toEqual([]);
      const { checkpoints, ...rest } = await residueOf(rig.machine.monitor);
      expect({ ...rest, checkpoints: [] }).toEqual(NOTHING);
      expect(checkpoints.length).toBeGreaterThanOrEqual(2);
      // As the end of the process would.
      if (fault.operation === "delete") await rm(`${rig.repository}/vm/lock`);
      await expectNextRight();
    },
  );

  /** The last: whether the point stands. Nothing interrupts a commit any more once the manifest is there. */
  const instants = [
    ["before it is written", "put", false],
    ["while it is read back", "get", true],
  ] as const;

  it.each(instants)(
    "interrupted at the manifest, %s: the point stands or it does not",
    async (_, at, stands) => {
      const interruption = new AbortController();
      const reason = new Error("interrupted");
      let isWritten = false;
      let id = "";
      const interrupting = new FaultyStorage(storage, (operation, key) => {
        const isNew = MANIFEST.test(key) && (isWritten || operation === "put");
        if (isNew && operation === "put") id = key.split("/")[1] ?? "";
        if (isNew && operation === at && key.includes(id)) interruption.abort(reason);
        isWritten ||= isNew;
        return Promise.resolve();
      });
      const warnings: string[] = [];
      const outcome = await backUp(interrupting, warnings, interruption.signal).catch(
        (error: unknown) => error,
      );
      expect(interruption.signal.aborted).toBe(true);
      expect({ stands: (await pointsOf(storage)).includes(id), warnings }).toEqual({ stands, warnings: [] });
      if (stands) await expectRight(outcome as PointManifest);
      else expect(outcome).toBe(reason);
      expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
      await expectNextRight();
    },
  );

  it("that is slow in everything: takes longer", async () => {
    const slow = new FaultyStorage(storage, () => sleep(10));
    newest = await backUp(slow);
    expect(slow.takeCounts().get("append")).toBeGreaterThan(0);
    await expectRight(newest);
  });

  it("leaves nothing in the machine in the end but the newest checkpoint", async () => {
    await expectNextRight();
    await expectNextRight();
    expect((await residueOf(rig.machine.monitor)).checkpoints).toHaveLength(2);
  });
});
