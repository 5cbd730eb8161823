import { randomBytes } from "node:crypto";
import { statfs } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { initRepository, type PointManifest, type Repository } from "../../src/repository/index.js";
import { deletePoint, flattenPoint } from "../../src/rewrite/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { checkImage, CLEAN, compareImages, toRaw } from "../support/image.js";
import { newFileSystem } from "../support/mount.js";
import { ioOf, type ProcessIo } from "../support/process-io.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";
import { pointId, writePoint } from "./repository-points.js";

const CLUSTER = 64 * KiB;
const machine = "web";
/** Stored data of the full image. */
const FULL = (process.env["TIDEMARK_SOAK"] === undefined ? 1024 : 4096) * MiB;

/** Incompressible clusters, of which no two at a distance of less than a prime number are alike. */
const NOISE = Array.from({ length: 97 }, () => randomBytes(CLUSTER));

function clusters(first: number, bytes: number, step = 1): Map<number, Buffer> {
  const count = bytes / CLUSTER;
  return new Map(
    Array.from({ length: count }, (_, index) => [
      first + index * step,
      NOISE[(first * 31 + index) % NOISE.length]!,
    ]),
  );
}

/** A repository with a chain of points, each of which writes some clusters of one disk. */
async function chainOf(
  directory: string,
  size: number,
  ...writes: readonly ReadonlyMap<number, Buffer>[]
): Promise<{ repository: Repository; points: PointManifest[]; path: (point: number) => string }> {
  const repository = await initRepository(await LocalStorage.open(directory, { create: true }));
  const points: PointManifest[] = [];
  for (const [index, data] of writes.entries()) {
    const disk = { name: "vda", token: "00c0ffee", virtualSize: size, data, parent: points.at(-1) };
    points.push(await writePoint(repository, { machine, id: pointId(index + 1), disks: [disk] }));
  }
  const path = (point: number): string => `${directory}/${machine}/${points[point]!.id}/vda.qcow2`;
  return { repository, points, path };
}

/** By bare qemu-img: the image is clean, and its chain reads as the raw file. */
async function expectSame(path: string, raw: string): Promise<void> {
  const { report, ...found } = await checkImage(path);
  expect(found, report).toEqual(CLEAN);
  expect(await compareImages({ path, format: "qcow2" }, { path: raw, format: "raw" })).toBe("identical");
}

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
    const { repository, points, path } = await chainOf(
      directory.file("repository"),
      size,
      clusters(0, FULL),
      clusters(5, 64 * MiB, 3),
      clusters(100, 8 * MiB, 2),
      clusters(7, MiB),
    );
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
    const { repository, points, path } = await chainOf(
      `${root}/repository`,
      full,
      clusters(0, full),
      clusters(5, increment, 3),
      clusters(7, MiB),
    );
    const raw = await toRaw(path(2), "qcow2", directory.file("before.raw"));
    const rawOfMiddle = await toRaw(path(1), "qcow2", directory.file("middle.raw"));
    const free = async (): Promise<number> => {
      await run("sync", ["-f", root]);
      const { bfree, bsize } = await statfs(root);
      return bfree * bsize;
    };
    const before = await free();
    const flattened = await ioOf(() => flattenPoint({ repository, machine, point: points[1]!.id }));
    expectMoved(flattened.io, 2 * increment);
    expect(flattened.result.rewritten).toMatchObject([{ baseBytes: points[0]!.disks[0]!.bytes }]);
    expect(before - (await free())).toBeLessThan(4 * increment);
    expect((await run("filefrag", ["-v", path(1)])).stdout).toMatch(/shared/);
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
