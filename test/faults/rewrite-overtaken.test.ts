import { randomBytes } from "node:crypto";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { FencedError, initRepository, openRepository, type Repository } from "../../src/repository/index.js";
import { deletePoint, flattenPoint, prunePoints } from "../../src/rewrite/index.js";
import { LocalStorage, MemoryStorage, type Storage } from "../../src/storage/index.js";
import { verifyMachine } from "../../src/verify/index.js";
import { pointId, writePoint } from "../interop/repository-points.js";
import { CrashingStorage } from "../support/crashing-storage.js";
import { GatedStorage } from "../support/gated-storage.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";

const CLUSTER = 64 * KiB;
const SIZE = 16 * CLUSTER;
const machine = "web";
const disk = { name: "sda", token: "00c0ffee", virtualSize: SIZE };

/** A chain of points, each of which writes two clusters; what each holds. */
async function writeChain(storage: Storage, count: number): Promise<Map<string, Buffer>> {
  const repository = await initRepository(storage);
  const held = new Map<string, Buffer>();
  let content = Buffer.alloc(SIZE);
  let parent;
  for (let number = 1; number <= count; number += 1) {
    const data = new Map([number, 10 + (number % 3)].map((cluster) => [cluster, randomBytes(CLUSTER)]));
    parent = await writePoint(repository, {
      machine,
      id: pointId(number),
      disks: [{ ...disk, data, parent }],
    });
    content = Buffer.from(content);
    for (const [cluster, bytes] of data) bytes.copy(content, cluster * CLUSTER);
    held.set(parent.id, content);
  }
  return held;
}

async function contentOf(repository: Repository, point: string): Promise<Buffer> {
  const chain = await repository.openChain(machine, point, disk.name);
  try {
    return await chain.chain.read(0, SIZE);
  } finally {
    await chain.close();
  }
}

/** Every point that is there reads as it must, and is verified. @returns their ids */
async function expectIntact(storage: Storage, held: ReadonlyMap<string, Buffer>): Promise<string[]> {
  const repository = await openRepository(storage);
  const points = await repository.points(machine);
  for (const { id } of points)
    expect((await contentOf(repository, id)).equals(held.get(id) ?? Buffer.of()), id).toBe(true);
  const { problems } = await verifyMachine({ repository, machine, workers: 1 });
  expect(problems).toEqual([]);
  return points.map(({ id }) => id);
}

/** As when the holder gave no sign of life for long. */
async function takeLock(storage: Storage): Promise<void> {
  await storage.delete(`${machine}/lock`);
}

describe("a rewriting run that is suspended, and overtaken by another", () => {
  let directory: TemporaryDirectory;
  let storage: LocalStorage;
  let held: Map<string, Buffer>;

  beforeEach(async () => {
    directory = await temporaryDirectory();
    storage = await LocalStorage.open(directory.file("repository"), { create: true });
    held = await writeChain(storage, 4);
  });

  afterEach(async () => {
    await directory[Symbol.asyncDispose]();
  });

  it("does not put its image over the other's when it goes on", async () => {
    const gated = new GatedStorage(storage, "commit", `${machine}/${pointId(3)}/sda.qcow2`);
    const repository = await openRepository(gated);
    const ended = deletePoint({ repository, machine, point: pointId(2) }).catch((error: unknown) => error);
    await gated.reached;
    await takeLock(storage);
    const rules = { policy: { last: 2 }, now: new Date(), timeZone: "UTC" };
    await prunePoints({ repository: await openRepository(storage), machine, ...rules });
    gated.wake();
    expect(await ended).toBeInstanceOf(FencedError);
    expect(await expectIntact(storage, held)).toEqual([pointId(3), pointId(4)]);
  });

  it("does not put its manifest over the other's when it goes on", async () => {
    const gated = new GatedStorage(storage, "commit", `${machine}/${pointId(3)}/point.json`);
    const repository = await openRepository(gated);
    const ended = deletePoint({ repository, machine, point: pointId(2) }).catch((error: unknown) => error);
    await gated.reached;
    await takeLock(storage);
    await flattenPoint({ repository: await openRepository(storage), machine, point: pointId(3) });
    gated.wake();
    expect(await ended).toBeInstanceOf(FencedError);
    expect(await expectIntact(storage, held)).toEqual([1, 2, 3, 4].map(pointId));
  });

  it("gives back the point that it removed when the other has continued it", async () => {
    const gated = new GatedStorage(storage, "delete", `${machine}/${pointId(4)}/point.json`);
    const repository = await openRepository(gated);
    const ended = deletePoint({ repository, machine, point: pointId(4), force: true }).catch(
      (error: unknown) => error,
    );
    await gated.reached;
    await takeLock(storage);
    const other = await openRepository(storage);
    const parent = await other.point(machine, pointId(4));
    await writePoint(other, { machine, id: pointId(5), disks: [{ ...disk, data: new Map(), parent }] });
    held.set(pointId(5), held.get(pointId(4)) ?? Buffer.of());
    gated.wake();
    expect(await ended).toBeInstanceOf(FencedError);
    expect(await expectIntact(storage, held)).toEqual([1, 2, 3, 4, 5].map(pointId));
  });
});

describe("prunePoints()", () => {
  it("says in a dry run what it does then, whatever a run left that died in the middle of a rewriting", async () => {
    const rules = { machine, policy: { last: 1 }, now: new Date(), timeZone: "UTC" };
    let isWhole = false;
    let replaced = 0;
    for (let crashAt = 0; !isWhole; crashAt += 1) {
      const storage = new MemoryStorage();
      const held = await writeChain(storage, 3);
      const dying = new CrashingStorage(storage, crashAt);
      await deletePoint({ repository: await openRepository(dying), machine, point: pointId(2) }).catch(
        () => undefined,
      );
      isWhole = !dying.hasCrashed;
      const repository = await openRepository(storage);
      const points = await repository.points(machine);
      if (points.every(({ pending }) => pending === undefined)) continue;
      const settled = await repository.settledPoints(machine);
      if (settled.some(({ disks }, index) => disks[0]?.parent !== points[index]?.disks[0]?.parent))
        replaced += 1;
      const expected = await prunePoints({ ...rules, repository, dryRun: true });
      await takeLock(storage);
      const done = await prunePoints({ ...rules, repository });
      expect(done.removed).toEqual(expected.removed);
      expect(done.rewritten.map(({ id, baseBytes }) => [id, baseBytes])).toEqual(
        expected.rewritten.map(({ id, baseBytes }) => [id, baseBytes]),
      );
      expect(await expectIntact(storage, held)).toEqual([pointId(3)]);
    }
    // The image was there, and the manifest did not say so yet.
    expect(replaced).toBeGreaterThan(1);
  });
});

describe("verifyMachine()", () => {
  it("finds no damage in what a run left that died at any moment of a rewriting", async () => {
    let isWhole = false;
    let pending = 0;
    for (let crashAt = 0; !isWhole; crashAt += 1) {
      const storage = new MemoryStorage();
      const held = await writeChain(storage, 3);
      const dying = new CrashingStorage(storage, crashAt);
      const repository = await openRepository(dying);
      await deletePoint({ repository, machine, point: pointId(2) }).catch(() => undefined);
      isWhole = !dying.hasCrashed;
      const points = await (await openRepository(storage)).points(machine);
      if (points.every((point) => point.pending === undefined) && !isWhole) continue;
      pending += 1;
      await expectIntact(storage, held);
    }
    expect(pending).toBeGreaterThan(3);
  });

  it("finds no damage in images that are written anew, and points that are removed, while it reads", async () => {
    const storage = new MemoryStorage();
    await writeChain(storage, 8);
    const repository = await openRepository(storage);
    let checked = 0;
    const rewrite = async (): Promise<void> => {
      await flattenPoint({ repository, machine, point: pointId(8) });
      await deletePoint({ repository, machine, point: pointId(3) });
    };
    let rewriting: Promise<void> | undefined;
    const observer = {
      progress: () => {
        checked += 1;
        if (checked > 1) rewriting ??= rewrite();
      },
    };
    const { problems } = await verifyMachine({ repository, machine, workers: 1, observer });
    expect(rewriting).toBeDefined();
    await rewriting;
    expect(problems).toEqual([]);
  });
});
