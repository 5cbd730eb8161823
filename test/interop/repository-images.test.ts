import { createHash, randomBytes } from "node:crypto";
import { mkdir, readFile, rename, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import {
  initRepository,
  openRepository,
  type PointManifest,
  type Repository,
} from "../../src/repository/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { checkImage, CLEAN, imageInfo, sha256OfDisk } from "../support/image.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { pointId, writePoint, type DiskContent } from "./repository-points.js";

const CLUSTER = 64 * KiB;
const SIZES = { root: 40 * CLUSTER, data: 25 * CLUSTER + 512 } as const;
const TOKENS = { root: "00000001", data: "00000002" } as const;
type DiskName = keyof typeof SIZES;

let directory: TemporaryDirectory;
let repository: Repository;
/** What each disk held at each point: made by plain writes into byte arrays. */
const models: { readonly manifest: PointManifest; readonly disks: Readonly<Record<DiskName, Buffer>> }[] = [];

/** Writes random clusters and zeroes into a model. @returns the same changes for an image */
function change(
  name: DiskName,
  model: Buffer,
  data: readonly number[],
  zero: readonly number[],
): DiskContent {
  const written = new Map<number, Buffer>();
  for (const cluster of data) {
    const length = Math.min(CLUSTER, model.length - cluster * CLUSTER);
    const bytes = cluster % 3 === 0 ? randomBytes(length) : Buffer.alloc(length, 65 + (cluster % 26));
    bytes.copy(model, cluster * CLUSTER);
    written.set(cluster, bytes);
  }
  for (const cluster of zero) model.fill(0, cluster * CLUSTER, (cluster + 1) * CLUSTER);
  const parent = models.at(-1)?.manifest;
  return { name, token: TOKENS[name], virtualSize: SIZES[name], data: written, zero, parent };
}

async function commit(
  number: number,
  changes: Record<DiskName, readonly [number[], number[]]>,
): Promise<void> {
  const last = models.at(-1)?.disks;
  const disks = {
    root: Buffer.from(last?.root ?? Buffer.alloc(SIZES.root)),
    data: Buffer.from(last?.data ?? Buffer.alloc(SIZES.data)),
  };
  const manifest = await writePoint(repository, {
    machine: "web",
    id: pointId(number),
    disks: [change("root", disks.root, ...changes.root), change("data", disks.data, ...changes.data)],
  });
  models.push({ manifest, disks });
}

beforeAll(async () => {
  directory = await temporaryDirectory("tm-repo-");
  repository = await initRepository(await LocalStorage.open(directory.file("backups"), { create: true }));
  await commit(1, { root: [[0, 1, 2, 9, 30, 39], []], data: [[0, 3, 24, 25], [7]] });
  await commit(2, {
    root: [
      [1, 31],
      [2, 30],
    ],
    data: [[25], [0]],
  });
  await commit(3, { root: [[2, 3], [1]], data: [[], []] });
});
afterAll(async () => {
  await directory[Symbol.asyncDispose]();
});

function imagePath(point: PointManifest, name: DiskName, root = directory.file("backups")): string {
  const disk = point.disks.find((candidate) => candidate.name === name);
  return join(root, point.machine.name, point.id, disk!.image);
}

function sha256(bytes: Buffer): string {
  return createHash("sha256").update(bytes).digest("hex");
}

describe("Repository in a directory", () => {
  it("openChain() reads every disk at every point", async () => {
    const again = await openRepository(await LocalStorage.open(directory.file("backups"), { openFiles: 1 }));
    for (const { manifest, disks } of models) {
      for (const name of ["root", "data"] as const) {
        const chain = await again.openChain("web", manifest.id, name);
        const read = await chain.chain.read(0, SIZES[name]);
        expect(sha256(read)).toBe(sha256(disks[name]));
        await chain.close();
      }
    }
  });

  it("is a qcow2 chain that qemu-img reads and finds clean", async () => {
    for (const { manifest, disks } of models) {
      for (const name of ["root", "data"] as const) {
        const path = imagePath(manifest, name);
        expect(await sha256OfDisk(path, "qcow2")).toBe(sha256(disks[name]));
        expect(await checkImage(path)).toMatchObject(CLEAN);
      }
    }
    const [first, second] = models;
    expect(await imageInfo(imagePath(second!.manifest, "root"), "qcow2")).toMatchObject({
      "backing-filename": `../${first!.manifest.id}/root.qcow2`,
      "cluster-size": CLUSTER,
    });
  });

  it("can be moved as a whole", async () => {
    const moved = directory.file("elsewhere");
    await rename(directory.file("backups"), moved);
    try {
      const { manifest, disks } = models[2]!;
      expect(await sha256OfDisk(imagePath(manifest, "root", moved), "qcow2")).toBe(sha256(disks.root));
      const again = await openRepository(await LocalStorage.open(moved));
      const chain = await again.openChain("web", manifest.id, "root");
      expect(sha256(await chain.chain.read(0, SIZES.root))).toBe(sha256(disks.root));
      await chain.close();
    } finally {
      await rename(moved, directory.file("backups"));
    }
  });

  it("has manifests whose lengths and digests are those of the files", async () => {
    for (const { manifest } of models) {
      for (const disk of manifest.disks) {
        const bytes = await readFile(imagePath(manifest, disk.name as DiskName));
        expect(bytes).toHaveLength(disk.bytes);
        for (const { offset, length, sha256: digest } of disk.segments)
          expect(sha256(bytes.subarray(offset, offset + length))).toBe(digest);
      }
    }
    expect(await repository.points("web")).toEqual(models.map(({ manifest }) => manifest));
  });

  it("refuses a manifest of 1 GB without reading it", async () => {
    const folder = join(directory.file("backups"), "huge", pointId(1));
    await mkdir(folder, { recursive: true });
    await writeFile(join(folder, "point.json"), "{");
    await truncate(join(folder, "point.json"), 1_000_000_000);
    const before = process.memoryUsage().rss;
    await expect(repository.points("huge")).rejects.toMatchObject({
      code: "TM_MANIFEST_DAMAGED",
      damage: { object: `huge/${pointId(1)}/point.json` },
    });
    expect(process.memoryUsage().rss - before).toBeLessThan(100_000_000);
  });

  it("opens a chain of 120 points with few files open", async () => {
    const storage = await LocalStorage.open(directory.file("long"), { create: true, openFiles: 16 });
    const long = await initRepository(storage);
    let parent: PointManifest | undefined;
    const model = Buffer.alloc(8 * CLUSTER);
    for (let number = 1; number <= 120; number += 1) {
      const bytes = Buffer.alloc(CLUSTER, number % 256);
      bytes.copy(model, (number % 8) * CLUSTER);
      const data = new Map([[number % 8, bytes]]);
      const disk = { name: "sda", token: TOKENS.root, virtualSize: model.length, data, parent };
      parent = await writePoint(long, { machine: "web", id: pointId(number), disks: [disk] });
    }
    const chain = await long.openChain("web", pointId(120), "sda");
    expect(sha256(await chain.chain.read(0, model.length))).toBe(sha256(model));
    expect(chain.images).toHaveLength(120);
    await chain.close();
  });
});
