import { chmod, stat, statfs } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { initRepository, type PointManifest } from "../../src/repository/index.js";
import { deletePoint, flattenPoint, prunePoints } from "../../src/rewrite/index.js";
import { MemoryStorage } from "../../src/storage/index.js";
import { FaultyStorage } from "../support/faulty-storage.js";
import { toRaw } from "../support/image.js";
import { newFileSystem } from "../support/mount.js";
import { ioOf, type ProcessIo } from "../support/process-io.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";
import { pointId, writeImages } from "./repository-points.js";
import { CLUSTER, expectSame, MACHINE as machine, noise, pointTree } from "./rewrite-fixture.js";

/** Stored data of the full image. */
const FULL = (process.env["TIDEMARK_SOAK"] === undefined ? 1024 : 4096) * MiB;

/** Bytes of tables, manifests, locks, and whatever else the process reads. */
const TABLES = 8 * MiB;

function expectMoved({ read, written }: ProcessIo, bytes: number): void {
  expect(read + written).toBeLessThanOrEqual(bytes + TABLES);
  // Whoever counts nothing proves nothing.
  expect(Math.min(read, written)).toBeGreaterThan(bytes / 6);
}

describe("deletePoint()", () => {
  it(`moves no more than three times an increment of 64 MiB, above a full of ${FULL / MiB} MiB`, async () => {
    await using directory = await temporaryDirectory();
    const size = FULL + 64 * MiB;
    const { repository, points, path } = await pointTree(directory.file("repository"), size, [
      { data: noise(0, FULL) },
      { data: noise(5, 64 * MiB, 3) },
      { data: noise(100, 8 * MiB, 2) },
      { data: noise(7, MiB) },
    ]);
    const raw = await toRaw(path(3), "qcow2", directory.file("before.raw"));
    // Without shared blocks the larger of the two is copied, too: it is no larger than increments are.
    for (const [point, least] of [
      [1, 8 * MiB - CLUSTER],
      [2, MiB - CLUSTER],
    ] as const) {
      const place = { repository, machine, point: points[point]!.id };
      const expected = await deletePoint({ ...place, dryRun: true });
      const { result, io } = await ioOf(() => deletePoint(place));
      expectMoved(io, 3 * 64 * MiB);
      const [rewritten, ...others] = result.rewritten;
      expect(others).toEqual([]);
      const { copiedBytes, writtenBytes } = rewritten!;
      expect(copiedBytes).toBeGreaterThan(least);
      expect(copiedBytes).toBeLessThan(least + MiB);
      expect(expected.rewritten).toEqual([
        {
          ...result.rewritten[0],
          copiedBytes: expect.any(Number) as number,
          writtenBytes: expect.any(Number) as number,
        },
      ]);
      const [estimate] = expected.rewritten;
      expect(estimate!.copiedBytes - copiedBytes).toBeGreaterThanOrEqual(0);
      expect(estimate!.copiedBytes - copiedBytes).toBeLessThan(512 * 8);
      expect(Math.abs(estimate!.writtenBytes - writtenBytes)).toBeLessThanOrEqual(CLUSTER);
    }
    await expectSame(path(3), raw);
  }, 240_000);
});

describe.each(["xfs", "btrfs"] as const)("on %s", (kind) => {
  it("the full is shared: flattenPoint() and deletePoint() of it move the increment alone", async () => {
    await using directory = await temporaryDirectory();
    const root = directory.file("mount");
    await using _mount = await newFileSystem(kind, root, 512 * MiB);
    const full = 96 * MiB;
    const increment = 8 * MiB;
    const { repository, points, path } = await pointTree(`${root}/repository`, full, [
      { data: noise(0, full) },
      { data: noise(5, increment, 3) },
      { data: noise(7, MiB) },
    ]);
    const raw = await toRaw(path(2), "qcow2", directory.file("before.raw"));
    const rawOfMiddle = await toRaw(path(1), "qcow2", directory.file("middle.raw"));
    const free = async (): Promise<number> => {
      await run("sync", ["-f", root]);
      const { bfree, bsize } = await statfs(root);
      return bfree * bsize;
    };
    // As a umask of 077 would have made it: what takes its bytes over is nobody else's business either.
    await chmod(path(0), 0o600);
    const before = await free();
    const flattened = await ioOf(() => flattenPoint({ repository, machine, point: points[1]!.id }));
    expectMoved(flattened.io, 2 * increment);
    expect(flattened.result.rewritten).toMatchObject([{ baseBytes: points[0]!.disks[0]!.bytes }]);
    expect(before - (await free())).toBeLessThan(4 * increment);
    expect((await run("filefrag", ["-v", path(1)])).stdout).toMatch(/shared/);
    expect((await stat(path(1))).mode & 0o777).toBe(0o600);
    await expectSame(path(1), rawOfMiddle);

    // The oldest full goes without a copy; then the one that took its data over, in which some is garbage now.
    await deletePoint({ repository, machine, point: points[0]!.id });
    const { io, result } = await ioOf(() => deletePoint({ repository, machine, point: points[1]!.id }));
    expectMoved(io, 2 * MiB);
    expect(result.rewritten[0]!.baseBytes).toBeGreaterThan(full);
    expect(before - (await free())).toBeLessThan(4 * increment);
    await expectSame(path(2), raw);
  });
});

describe("prunePoints()", () => {
  /** What is asked of the storage when every second one of a chain's points goes. */
  async function requestsFor(count: number): Promise<number> {
    const storage = new FaultyStorage(new MemoryStorage());
    const repository = await initRepository(storage);
    let parent: PointManifest | undefined;
    for (let number = 1; number <= count; number += 1) {
      const disk = { name: "vda", token: "00c0ffee", virtualSize: MiB, clusterSize: 4 * KiB };
      const data = new Map([[number % 256, Buffer.from(String(number))]]);
      const name = number % 2 === 0 ? "kept" : null;
      const point = { machine, id: pointId(number), name, disks: [{ ...disk, data, parent }] };
      parent = await writeImages(repository, point);
      // Committing would look at the whole chain each time.
      await storage.put(`${machine}/${parent.id}/point.json`, Buffer.from(JSON.stringify(parent)));
    }
    storage.takeCounts();
    const policy = { names: ["kept"] };
    const { removed, rewritten } = await prunePoints({
      ...{ repository, machine, policy, now: new Date(), timeZone: "UTC" },
    });
    expect([removed.length, rewritten.length]).toEqual([count / 2, count / 2]);
    const chain = await repository.openChain(machine, pointId(count), "vda");
    expect(chain.images).toHaveLength(count / 2);
    for (const number of [1, count - 1]) {
      const bytes = await chain.chain.read((number % 256) * 4 * KiB, 4 * KiB);
      expect(bytes.subarray(0, String(number).length).toString()).toBe(String(number));
    }
    await chain.close();
    return [...storage.takeCounts().values()].reduce((sum, requests) => sum + requests, 0);
  }

  it("asks the storage for twice as much when a chain is twice as long, not four times", async () => {
    const [short, long] = [await requestsFor(100), await requestsFor(200)];
    expect(long / short).toBeLessThan(2.2);
    expect(long / 100).toBeLessThan(120);
  });
});
