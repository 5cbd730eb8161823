import { createHash, randomBytes, randomInt } from "node:crypto";
import { open } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { DamageError, TidemarkError } from "../../src/errors/index.js";
import { ImageChain, ImageReader } from "../../src/qcow2/index.js";
import { initRepository, type PointManifest, type Repository } from "../../src/repository/index.js";
import { LocalStorage, MemoryStorage } from "../../src/storage/index.js";
import { pointId, writePoint } from "../interop/repository-points.js";
import { temporaryDirectory } from "../support/temporary.js";

const TOKEN = "00c0ffee";
const [P1, P2, P3] = [1, 2, 3].map(pointId) as [string, string, string];

interface Model {
  readonly points: readonly PointManifest[];
  /** What the disk holds at the newest point. */
  readonly disk: Buffer;
}

/** Three points of one disk: full, and two increments with data and explicit zeroes over data. */
async function writeChain(repository: Repository, size: number, clusterSize: number): Promise<Model> {
  const disk = Buffer.alloc(size);
  const points: PointManifest[] = [];
  const clusters = Math.ceil(size / clusterSize);
  for (const [index, id] of [P1, P2, P3].entries()) {
    const data = new Map<number, Buffer>();
    const zero: number[] = [];
    for (let cluster = 0; cluster < clusters; cluster += 1) {
      const start = cluster * clusterSize;
      const length = Math.min(clusterSize, size - start);
      if (index > 0 && cluster % 4 !== index) {
        if (cluster % 8 !== index + 2) continue;
        zero.push(cluster);
        disk.fill(0, start, start + length);
        continue;
      }
      const bytes = cluster % 2 === 0 ? randomBytes(length) : textOf(cluster, index, length);
      data.set(cluster, bytes);
      bytes.copy(disk, start);
    }
    const content = { name: "sda", token: TOKEN, virtualSize: size, clusterSize, data, zero };
    const parent = points.at(-1);
    points.push(await writePoint(repository, { machine: "web", id, disks: [{ ...content, parent }] }));
  }
  return { points, disk };
}

/** Three points that each hold a third of the disk, no cluster twice: every frame counts. */
async function writeDisjointChain(repository: Repository, size: number, clusterSize: number): Promise<Model> {
  const disk = Buffer.alloc(size);
  const points: PointManifest[] = [];
  for (const [index, id] of [P1, P2, P3].entries()) {
    const data = new Map<number, Buffer>();
    for (let cluster = index; cluster * clusterSize < size; cluster += 3) {
      const length = Math.min(clusterSize, size - cluster * clusterSize);
      const bytes =
        cluster % 2 === 0 ? randomBytes(length) : Buffer.from(randomBytes(length).toString("base64"));
      data.set(cluster, bytes.subarray(0, length));
      bytes.copy(disk, cluster * clusterSize, 0, length);
    }
    const content = {
      name: "sda",
      token: TOKEN,
      virtualSize: size,
      clusterSize,
      data,
      parent: points.at(-1),
    };
    points.push(await writePoint(repository, { machine: "web", id, disks: [content] }));
  }
  return { points, disk };
}

function textOf(cluster: number, index: number, length: number): Buffer {
  return Buffer.alloc(length, `cluster ${cluster} of point ${index}, as a guest would write it; `);
}

/** Reads the whole disk at the newest point. @returns its bytes, or the damage that was told instead */
async function readDisk(repository: Repository): Promise<Buffer | DamageError> {
  try {
    const chain = await repository.openChain("web", P3, "sda");
    try {
      return await chain.chain.read(0, chain.chain.virtualSize);
    } catch (error) {
      throw await chain.explain(error);
    } finally {
      await chain.close();
    }
  } catch (error) {
    if (error instanceof DamageError) return error;
    throw error;
  }
}

/** What a flip led to. Wrong bytes, or a damage that does not name image and points, fail the test. */
function judge(result: Buffer | DamageError, model: Model, point: string, where: string): "same" | "damage" {
  if (result instanceof DamageError) {
    const affected = [P1, P2, P3].slice([P1, P2, P3].indexOf(point));
    const damage = { object: `web/${point}/sda.qcow2`, points: affected };
    expect({ where, damage: result.damage }).toEqual({ where, damage });
    expect(result.message).toContain(damage.object);
    for (const id of affected) expect(result.message).toContain(id);
    return "damage";
  }
  if (!result.equals(model.disk)) throw new Error(`${where}: the disk read wrong bytes`);
  return "same";
}

describe("a damaged image", () => {
  it.each([P2, P1])(
    "never yields wrong bytes, whichever byte of its header, extensions, tables and refcounts is flipped (%s)",
    { timeout: 120_000 },
    async (point) => {
      const storage = new MemoryStorage();
      const repository = await initRepository(storage);
      const model = await writeChain(repository, 24 * 4 * KiB + 512, 4 * KiB);
      const key = `web/${point}/sda.qcow2`;
      const image = await storage.get(key, { maxLength: MiB });
      const { segments } = model.points.find(({ id }) => id === point)!.disks[0]!;
      const outcomes = { header: { same: 0, damage: 0 }, table: { same: 0, damage: 0 } };
      for (const { kind, offset, length } of segments) {
        if (kind === "data") continue;
        for (let at = offset; at < offset + length; at += 1) {
          const bit = 1 << (at % 8);
          image[at]! ^= bit;
          await storage.put(key, image);
          image[at]! ^= bit;
          outcomes[kind][judge(await readDisk(repository), model, point, `byte ${at} (${kind})`)] += 1;
        }
      }
      // Header (and its extensions), L1, L2, refcount table and block: one cluster each, and nothing escapes.
      expect(outcomes).toEqual({
        header: { same: 0, damage: 4 * KiB },
        table: { same: 0, damage: expect.any(Number) as number },
      });
      expect(outcomes.table.damage).toBeGreaterThanOrEqual(4 * 4 * KiB);
      await storage.put(key, image);
      expect(judge(await readDisk(repository), model, point, "undamaged")).toBe("same");
    },
  );

  it("would yield the parent's old bytes if its tables were not verified: the flips are real", async () => {
    const storage = new MemoryStorage();
    const repository = await initRepository(storage);
    const model = await writeChain(repository, 24 * 4 * KiB + 512, 4 * KiB);
    const key = `web/${P3}/sda.qcow2`;
    const image = await storage.get(key, { maxLength: MiB });
    // Cluster 4 is an explicit zero cluster of P3 (L2 entry 1) above data of P1: turn it into "unallocated".
    const l1 = Number(image.readBigUInt64BE(40));
    const l2 = Number(image.readBigUInt64BE(l1) & 0x00fffffffffffe00n);
    expect(image[l2 + 4 * 8 + 7]).toBe(1);
    image[l2 + 4 * 8 + 7] = 0;
    await storage.put(key, image);
    const readers = [];
    for (const id of [P3, P2, P1])
      readers.push(await ImageReader.open(await storage.open(`web/${id}/sda.qcow2`)));
    const unverified = await ImageChain.of(readers).read(0, model.disk.length);
    expect(unverified.equals(model.disk)).toBe(false);
    expect(judge(await readDisk(repository), model, P3, "L2 entry of cluster 4")).toBe("damage");
  });

  it(
    "never yields wrong bytes, whichever of 500 random payload bytes is changed",
    { timeout: 120_000 },
    async () => {
      await using directory = await temporaryDirectory("tm-damage-");
      const repository = await initRepository(await LocalStorage.open(directory.path));
      const model = await writeDisjointChain(repository, 4 * MiB - 512, 64 * KiB);
      const outcomes = { same: 0, damage: 0 };
      for (let round = 0; round < 500; round += 1) {
        const { id, disks } = model.points[round % 3]!;
        const frames = disks[0]!.segments.filter((segment) => segment.kind === "data");
        const { offset, length } = frames[randomInt(frames.length)]!;
        const at = offset + randomInt(length);
        const mask = randomInt(1, 256);
        await using file = await open(join(directory.path, "web", id, "sda.qcow2"), "r+");
        const byte = Buffer.alloc(1);
        await file.read(byte, 0, 1, at);
        byte[0]! ^= mask;
        await file.write(byte, 0, 1, at);
        outcomes[judge(await readDisk(repository), model, id, `byte ${at} ^ ${mask} of ${id}`)] += 1;
        byte[0]! ^= mask;
        await file.write(byte, 0, 1, at);
      }
      // All frames are read; only the padding before the tables, less than 7 % of each image, is not.
      expect(outcomes.damage).toBeGreaterThan(430);
      expect(judge(await readDisk(repository), model, P3, "undamaged")).toBe("same");
    },
  );

  it("never yields wrong bytes, whichever byte of a manifest is flipped", { timeout: 120_000 }, async () => {
    const storage = new MemoryStorage();
    const repository = await initRepository(storage);
    const model = await writeChain(repository, 24 * 4 * KiB + 512, 4 * KiB);
    const outcomes = { same: 0, refused: 0 };
    for (const { id } of model.points) {
      const key = `web/${id}/point.json`;
      const manifest = await storage.get(key, { maxLength: MiB });
      for (let at = 0; at < manifest.length; at += 1) {
        const changed = Buffer.from(manifest);
        changed[at]! ^= 1 << (at % 8);
        await storage.put(key, changed);
        const result = await readDisk(repository).catch((error: unknown) => error);
        if (result instanceof Buffer) {
          if (!result.equals(model.disk)) throw new Error(`byte ${at} of ${key}: the disk read wrong bytes`);
          outcomes.same += 1;
        } else {
          expect(result).toBeInstanceOf(TidemarkError);
          outcomes.refused += 1;
        }
      }
      await storage.put(key, manifest);
    }
    // What is said besides the images (times, versions, the machine's description) may change unnoticed.
    expect(outcomes.refused).toBeGreaterThan(outcomes.same);
  });

  it("is told apart from a storage that fails: an I/O error is no damage", async () => {
    const storage = new MemoryStorage();
    const repository = await initRepository(storage);
    await writeChain(repository, MiB, 64 * KiB);
    const failure = new Error("EIO: i/o error, read");
    const opened = storage.open.bind(storage);
    storage.open = async (key, options) => {
      const reader = await opened(key, options);
      return { length: reader.length, read: () => Promise.reject(failure), close: () => reader.close() };
    };
    await expect(readDisk(repository)).rejects.toBe(failure);
  });

  it("is named by its digest, which is what sha256 says of the segments", async () => {
    const storage = new MemoryStorage();
    const repository = await initRepository(storage);
    const { points } = await writeChain(repository, MiB, 64 * KiB);
    for (const { id, disks } of points) {
      const image = await storage.get(`web/${id}/sda.qcow2`, { maxLength: 4 * MiB });
      const all = createHash("sha256");
      for (const { offset, length } of disks[0]!.segments)
        all.update(
          createHash("sha256")
            .update(image.subarray(offset, offset + length))
            .digest(),
        );
      expect(all.digest("hex")).toBe(disks[0]!.sha256);
    }
  });
});
