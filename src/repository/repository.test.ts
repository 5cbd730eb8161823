import { createHash } from "node:crypto";
import { beforeEach, describe, expect, it } from "vitest";
import { pointId, writeImages, writePoint, type DiskContent } from "../../test/interop/repository-points.js";
import { DamageError, NotFoundError, UsageError } from "../errors/index.js";
import { digestOfSegments, ImageReader } from "../qcow2/index.js";
import { MemoryStorage } from "../storage/index.js";
import { FencedError } from "./errors.js";
import type { PointManifest } from "./manifest.js";
import { encodeManifest } from "./manifest-codec.js";
import { initRepository, openRepository, type Repository } from "./repository.js";

const MAX = { maxLength: 1 << 24 };
const [P1, P2, P3, P4] = [1, 2, 3, 4].map(pointId) as [string, string, string, string];

let storage: MemoryStorage;
let repository: Repository;

beforeEach(async () => {
  storage = new MemoryStorage();
  repository = await initRepository(storage);
});

function disk(changes: Partial<DiskContent> = {}): DiskContent {
  const data = new Map([
    [0, Buffer.from("zero")],
    [5, Buffer.from("five")],
  ]);
  return { name: "sda", token: "00c0ffee", virtualSize: 1 << 20, data, ...changes };
}

async function keysOf(prefix = ""): Promise<string[]> {
  const keys: string[] = [];
  for await (const { key } of storage.list(prefix)) keys.push(key);
  return keys.sort();
}

/** Three points of one disk. */
async function chainOfThree(): Promise<[PointManifest, PointManifest, PointManifest]> {
  const first = await writePoint(repository, { machine: "web", id: P1, disks: [disk()] });
  const increment = (parent: PointManifest, text: string): DiskContent =>
    disk({ parent, data: new Map([[5, Buffer.from(text)]]) });
  const second = await writePoint(repository, { machine: "web", id: P2, disks: [increment(first, "FIVE")] });
  const third = await writePoint(repository, { machine: "web", id: P3, disks: [increment(second, "5")] });
  return [first, second, third];
}

/** Replaces a stored manifest by a changed one, as if it had been written so. */
async function rewrite(
  manifest: PointManifest,
  changes: Partial<PointManifest["disks"][number]>,
): Promise<void> {
  const changed = { ...manifest, disks: manifest.disks.map((one) => ({ ...one, ...changes })) };
  await storage.put(`web/${manifest.id}/point.json`, encodeManifest(changed));
}

describe("initRepository() and openRepository()", () => {
  it("make a repository that opens with the id it was given", async () => {
    const again = await openRepository(storage);
    expect(again.id).toBe(repository.id);
    expect(again.file).toMatchObject({ format: 1, storage: { ifAbsent: true } });
    expect(await keysOf()).toEqual(["tidemark.json"]);
  });

  it("refuse a place with a repository, and leave it alone", async () => {
    const before = await storage.get("tidemark.json", MAX);
    await expect(initRepository(storage)).rejects.toThrow(UsageError);
    await expect(initRepository(storage)).rejects.toThrow("there is one already");
    expect((await storage.get("tidemark.json", MAX)).equals(before)).toBe(true);
  });

  it("refuse a place with other things in it, naming one", async () => {
    const other = new MemoryStorage();
    await other.put("photos/cat.jpg", Buffer.from("x"));
    await expect(initRepository(other)).rejects.toThrow('"photos" is there');
    const flat = new MemoryStorage();
    await flat.put("cat.jpg", Buffer.from("x"));
    await expect(initRepository(flat)).rejects.toThrow('"cat.jpg" is there');
  });

  it("have one winner when several make a repository at once", async () => {
    const place = new MemoryStorage();
    const results = await Promise.allSettled(Array.from({ length: 8 }, () => initRepository(place)));
    const won = results.flatMap((result) => (result.status === "fulfilled" ? [result.value.id] : []));
    expect(won).toEqual([(await openRepository(place)).id]);
  });

  it("tell a missing repository, a newer one and a broken one apart", async () => {
    const place = new MemoryStorage();
    await expect(openRepository(place)).rejects.toThrow(NotFoundError);
    await expect(openRepository(place)).rejects.toMatchObject({
      hint: expect.stringContaining("tidemark init") as string,
    });
    await place.put("tidemark.json", Buffer.from('{"format": 2, "id": 7}'));
    await expect(openRepository(place)).rejects.toMatchObject({ code: "TM_FORMAT_NEWER" });
    await place.put("tidemark.json", Buffer.from('{"format": 1'));
    await expect(openRepository(place)).rejects.toThrow(DamageError);
    await place.put("tidemark.json", Buffer.alloc(100_000, "x"));
    await expect(openRepository(place)).rejects.toMatchObject({ code: "TM_OBJECT_TOO_LARGE" });
  });
});

describe("Repository.points()", () => {
  it("returns the points oldest first, and no folder without a manifest", async () => {
    await chainOfThree();
    await writeImages(repository, { machine: "web", id: P4, disks: [disk()] });
    await storage.put("web/notes/readme.txt", Buffer.from("mine"));
    expect((await repository.points("web")).map((point) => point.id)).toEqual([P1, P2, P3]);
    expect((await repository.survey("web")).uncommitted).toEqual([P4]);
    expect(await repository.points("db")).toEqual([]);
    expect(await repository.machines()).toEqual(["web"]);
  });

  it("reports a manifest that cannot be read, and survey() still shows the others", async () => {
    await chainOfThree();
    await storage.put(`web/${P2}/point.json`, Buffer.from("{"));
    await expect(repository.points("web")).rejects.toMatchObject({
      code: "TM_MANIFEST_DAMAGED",
      damage: { object: `web/${P2}/point.json`, points: [P2] },
    });
    const { points, unreadable } = await repository.survey("web");
    expect(points.map((point) => point.id)).toEqual([P1, P3]);
    expect(unreadable.map((point) => point.id)).toEqual([P2]);
  });

  it("refuses a manifest that belongs to another machine or point", async () => {
    const [first] = await chainOfThree();
    await storage.put(`db/${P1}/point.json`, encodeManifest(first));
    await expect(repository.points("db")).rejects.toThrow('manifest of machine "web"');
    await storage.put(`web/${P4}/point.json`, encodeManifest(first));
    await expect(repository.point("web", P4)).rejects.toThrow(`manifest of point ${P1}`);
  });

  it("never asks the storage for a hostile name", async () => {
    for (const machine of ["..", "../x", "/etc", "", "tidemark.json", "a/b"]) {
      await expect(repository.points(machine)).rejects.toThrow(UsageError);
      await expect(repository.lockMachine(machine)).rejects.toThrow(UsageError);
    }
    for (const id of ["..", "../../etc", "latest", ""])
      await expect(repository.point("web", id)).rejects.toThrow(UsageError);
  });
});

describe("Repository.createImage()", () => {
  it("names the parent's image by its file, relative to the image's own folder", async () => {
    const first = await writePoint(repository, { machine: "web", id: P1, disks: [disk({ name: "old" })] });
    await writePoint(repository, { machine: "web", id: P2, disks: [disk({ name: "new", parent: first })] });
    const source = await storage.open(`web/${P2}/new.qcow2`);
    const reader = await ImageReader.open(source);
    expect(reader.backingFile).toBe(`../${P1}/old.qcow2`);
    expect(reader.identity).toEqual({
      point: P2,
      parent: P1,
      machine: "web",
      disk: "new",
      token: "00c0ffee",
    });
  });

  it("leaves nothing when the image is aborted, or cannot be", async () => {
    const image = {
      machine: "web",
      point: P1,
      disk: "sda",
      token: "00c0ffee",
      virtualSize: 1 << 20,
      clusterSize: 65_536,
    };
    await (await repository.createImage(image)).abort();
    await expect(repository.createImage({ ...image, virtualSize: 1000 })).rejects.toThrow(UsageError);
    await expect(repository.createImage({ ...image, disk: "../x" })).rejects.toThrow(UsageError);
    await expect(repository.createImage({ ...image, parent: { point: "..", image: "x" } })).rejects.toThrow(
      UsageError,
    );
    expect(await keysOf("web/")).toEqual([]);
  });
});

describe("Repository.openChain()", () => {
  it("reads a disk at each of its points", async () => {
    await chainOfThree();
    for (const [id, text] of [
      [P1, "five"],
      [P2, "FIVE"],
      [P3, "5\0\0\0"],
    ] as const) {
      const chain = await repository.openChain("web", id, "sda");
      expect((await chain.chain.read(5 * 65_536, 4)).toString()).toBe(text);
      expect((await chain.chain.read(0, 4)).toString()).toBe("zero");
      expect(chain.images.map((image) => image.point.id)).toEqual(
        [P3, P2, P1].slice([P3, P2, P1].indexOf(id)),
      );
      await chain.close();
    }
  });

  it("follows a disk by its token where its name changed", async () => {
    const first = await writePoint(repository, { machine: "web", id: P1, disks: [disk({ name: "old" })] });
    const other = disk({ name: "old", token: "0badcafe" });
    await writePoint(repository, {
      machine: "web",
      id: P2,
      disks: [disk({ name: "new", parent: first, data: new Map() }), other],
    });
    const chain = await repository.openChain("web", P2, "new");
    expect((await chain.chain.read(0, 4)).toString()).toBe("zero");
    expect(chain.images.map((image) => image.key)).toEqual([`web/${P2}/new.qcow2`, `web/${P1}/old.qcow2`]);
    await chain.close();
  });

  it("tells a missing point or disk from damage", async () => {
    await chainOfThree();
    await expect(repository.openChain("web", P4, "sda")).rejects.toThrow(NotFoundError);
    await expect(repository.openChain("web", P3, "sdb")).rejects.toMatchObject({ hint: 'It holds "sda"' });
  });

  it("names the missing manifest of a chain, and the points that need it", async () => {
    await chainOfThree();
    await storage.delete(`web/${P1}/point.json`);
    await expect(repository.openChain("web", P3, "sda")).rejects.toMatchObject({
      code: "TM_CHAIN_DAMAGED",
      damage: { object: `web/${P1}/point.json`, points: [P2, P3] },
    });
  });

  it("names a missing, shorter or longer image, and all points that need it", async () => {
    await chainOfThree();
    const key = `web/${P2}/sda.qcow2`;
    const damage = { code: "TM_POINT_IMAGE_DAMAGED", damage: { object: key, points: [P2, P3] } };
    const bytes = await storage.get(key, MAX);
    for (const wrong of [undefined, bytes.subarray(1), Buffer.concat([bytes, Buffer.alloc(1)])]) {
      if (wrong === undefined) await storage.delete(key);
      else await storage.put(key, wrong);
      // Opened at its own point: the newer one, which needs it too, is found all the same.
      await expect(repository.openChain("web", P2, "sda")).rejects.toMatchObject(damage);
      await expect(repository.openChain("web", P3, "sda")).rejects.toMatchObject(damage);
    }
    await (await repository.openChain("web", P1, "sda")).close();
  });

  it("refuses the image of another point, disk or machine under a right-looking manifest", async () => {
    const [first, second] = await chainOfThree();
    const own = await storage.get(`web/${P1}/sda.qcow2`, MAX);
    const other = await writePoint(repository, { machine: "db", id: P1, disks: [disk()] });
    await storage.put(`web/${P1}/sda.qcow2`, await storage.get(`db/${P1}/sda.qcow2`, MAX));
    await rewrite(first, {
      segments: other.disks[0]!.segments,
      sha256: other.disks[0]!.sha256,
      bytes: other.disks[0]!.bytes,
    });
    await expect(repository.openChain("web", P1, "sda")).rejects.toThrow(
      'its header says machine "db", "web" is expected',
    );
    await storage.put(`web/${P1}/sda.qcow2`, own);
    await rewrite(first, {});
    const clean = await repository.openChain("web", P2, "sda");
    await clean.close();
    await rewrite(second, { virtualSize: 2 << 20 });
    await expect(repository.openChain("web", P2, "sda")).rejects.toThrow(
      "its header says virtual size 1048576",
    );
    await rewrite(second, { kind: "full", reason: "so it says", parent: null });
    await expect(repository.openChain("web", P2, "sda")).rejects.toThrow(
      `backing file "../${P1}/sda.qcow2", none is expected`,
    );
    await rewrite(second, { token: "0badcafe", bitmap: null });
    await expect(repository.openChain("web", P2, "sda")).rejects.toThrow("holds no disk 0badcafe");
  });

  it("refuses an image whose tables lie among its frames, although manifest and L1 table agree", async () => {
    const manifest = await writePoint(repository, { machine: "web", id: P1, disks: [disk()] });
    const key = `web/${P1}/sda.qcow2`;
    const bytes = await storage.get(key, MAX);
    // The one data segment begins behind the header cluster, and is one cluster long.
    bytes.writeBigUInt64BE((1n << 63n) | 65536n, Number(bytes.readBigUInt64BE(40)));
    await storage.put(key, bytes);
    const segments = (manifest.disks[0]?.segments ?? []).map((segment) => {
      const { offset, length } = segment;
      const part = bytes.subarray(offset, offset + length);
      return { ...segment, sha256: createHash("sha256").update(part).digest("hex") };
    });
    await rewrite(manifest, { segments, sha256: digestOfSegments(segments) });
    const chain = await repository.openChain("web", P1, "sda");
    await expect(chain.chain.read(0, 512)).rejects.toThrow("at byte 65536, where frames are stored");
    await chain.close();
  });

  it("explains the damage of a frame by its image and points", async () => {
    const [first] = await chainOfThree();
    const key = `web/${P1}/sda.qcow2`;
    const bytes = await storage.get(key, MAX);
    const frames = first.disks[0]!.segments.find((segment) => segment.kind === "data")!;
    bytes[frames.offset + 12]! ^= 1;
    await storage.put(key, bytes);
    const chain = await repository.openChain("web", P3, "sda");
    const error: unknown = await chain.chain.read(0, 65_536).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(DamageError);
    expect(await chain.explain(error)).toMatchObject({
      code: "TM_POINT_IMAGE_DAMAGED",
      damage: { object: key, points: [P1, P2, P3] },
    });
    const other = new Error("something else");
    expect(await chain.explain(other)).toBe(other);
    await chain.close();
  });
});

describe("Repository.commitPoint()", () => {
  it("refuses a point whose image is missing, short, or not the one of the manifest", async () => {
    const manifest = await writeImages(repository, { machine: "web", id: P1, disks: [disk()] });
    const fence = (): Promise<void> => Promise.resolve();
    const key = `web/${P1}/sda.qcow2`;
    const bytes = await storage.get(key, MAX);
    await storage.put(key, bytes.subarray(0, -1));
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(DamageError);
    const header = Buffer.from(bytes);
    header[30]! ^= 1;
    await storage.put(key, header);
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(
      "its header in bytes 0 to 65535 differs",
    );
    await storage.delete(key);
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow("it is missing");
    expect(await repository.point("web", P1)).toBeUndefined();
    await storage.put(key, bytes);
    await repository.commitPoint(manifest, { fence });
    expect(await repository.point("web", P1)).toEqual(manifest);
  });

  it("refuses an increment of a point that is not there", async () => {
    const first = await writePoint(repository, { machine: "web", id: P1, disks: [disk()] });
    const manifest = await writeImages(repository, {
      machine: "web",
      id: P2,
      disks: [disk({ parent: first })],
    });
    await storage.delete(`web/${P1}/point.json`);
    await expect(repository.commitPoint(manifest, { fence: () => Promise.resolve() })).rejects.toThrow(
      DamageError,
    );
    expect(await repository.point("web", P2)).toBeUndefined();
  });

  it("writes nothing when the fence is down before", async () => {
    const manifest = await writeImages(repository, { machine: "web", id: P1, disks: [disk()] });
    const fence = (): Promise<void> => Promise.reject(new FencedError("lost"));
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(FencedError);
    expect(await repository.point("web", P1)).toBeUndefined();
  });

  it("withdraws the point when the fence is down after, and leaves its images", async () => {
    const manifest = await writeImages(repository, { machine: "web", id: P1, disks: [disk()] });
    let asked = 0;
    const fence = async (): Promise<void> => {
      asked += 1;
      if (asked === 2) {
        expect(await repository.point("web", P1)).toEqual(manifest);
        throw new FencedError("lost");
      }
    };
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(FencedError);
    expect(asked).toBe(2);
    expect(await keysOf("web/")).toEqual([`web/${P1}/sda.qcow2`]);
  });

  it("withdraws the point when its images went away meanwhile", async () => {
    const manifest = await writeImages(repository, { machine: "web", id: P1, disks: [disk()] });
    let asked = 0;
    const fence = async (): Promise<void> => {
      asked += 1;
      if (asked === 2) await storage.delete(`web/${P1}/sda.qcow2`);
    };
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(DamageError);
    expect(await keysOf("web/")).toEqual([]);
  });

  it("leaves the point when another run has built on it meanwhile, however late that was", async () => {
    for (const [id, next, when] of [
      [P1, P2, "before the fence is down"],
      [P3, P4, "while the point is withdrawn"],
    ] as const) {
      const manifest = await writeImages(repository, { machine: "web", id, disks: [disk()] });
      const build = async (): Promise<void> => {
        await writePoint(repository, { machine: "web", id: next, disks: [disk({ parent: manifest })] });
      };
      const remove = storage.delete.bind(storage);
      storage.delete = async (...call) => {
        if (when === "while the point is withdrawn") await build();
        await remove(...call);
      };
      let asked = 0;
      const fence = async (): Promise<void> => {
        asked += 1;
        if (asked === 1) return;
        if (when === "before the fence is down") await build();
        throw new FencedError("lost");
      };
      await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(FencedError);
      storage.delete = remove;
      expect({ when, point: await repository.point("web", id) }).toEqual({ when, point: manifest });
      await (await repository.openChain("web", next, "sda")).close();
    }
  });

  it("withdraws the point when writing its manifest failed after it was there", async () => {
    const manifest = await writeImages(repository, { machine: "web", id: P1, disks: [disk()] });
    const put = storage.put.bind(storage);
    const failure = new Error("EIO: i/o error, fsync");
    storage.put = async (...call) => {
      await put(...call);
      throw failure;
    };
    await expect(repository.commitPoint(manifest, { fence: () => Promise.resolve() })).rejects.toBe(failure);
    expect(await keysOf("web/")).toEqual([`web/${P1}/sda.qcow2`]);
  });

  it("withdraws the point when the storage kept only a part of its manifest", async () => {
    const point = { machine: "web", id: P1, disks: [disk()] };
    const manifest = await writeImages(repository, point);
    const put = storage.put.bind(storage);
    storage.put = (key, bytes, options) => put(key, bytes.subarray(0, bytes.length - 1), options);
    const fence = (): Promise<void> => Promise.resolve();
    await expect(repository.commitPoint(manifest, { fence })).rejects.toMatchObject({
      code: "TM_MANIFEST_TORN",
    });
    expect(await repository.survey("web")).toMatchObject({ points: [], unreadable: [], uncommitted: [P1] });
  });

  it("withdraws the point when its parent went away or was rewritten meanwhile", async () => {
    const first = await writePoint(repository, { machine: "web", id: P1, disks: [disk()] });
    for (const change of [
      () => rewrite(first, { reason: "rewritten", garbageBytes: 1, image: "other.qcow2" }),
      () => storage.delete(`web/${P1}/point.json`),
    ]) {
      await rewrite(first, {});
      const manifest = await writeImages(repository, {
        machine: "web",
        id: P2,
        disks: [disk({ parent: first })],
      });
      let asked = 0;
      const fence = async (): Promise<void> => {
        asked += 1;
        if (asked === 2) await change();
      };
      await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow();
      expect(await repository.point("web", P2)).toBeUndefined();
    }
  });

  it("is done when its own manifest is there already, and refuses another one", async () => {
    const manifest = await writePoint(repository, { machine: "web", id: P1, disks: [disk()] });
    const fence = (): Promise<void> => Promise.resolve();
    await repository.commitPoint(manifest, { fence });
    const other = { ...manifest, description: "another" };
    await expect(repository.commitPoint(other, { fence })).rejects.toMatchObject({ code: "TM_POINT_EXISTS" });
    expect(await repository.point("web", P1)).toEqual(manifest);
  });
});

describe("Repository.discardPoint() and collectGarbage()", () => {
  it("discardPoint() removes an uncommitted point, never a committed or unreadable one", async () => {
    await writeImages(repository, { machine: "web", id: P1, disks: [disk()] });
    await repository.discardPoint("web", P1);
    expect(await keysOf("web/")).toEqual([]);
    await writePoint(repository, { machine: "web", id: P2, disks: [disk()] });
    await expect(repository.discardPoint("web", P2)).rejects.toMatchObject({ code: "TM_POINT_COMMITTED" });
    await storage.put(`web/${P2}/point.json`, Buffer.from("{"));
    await expect(repository.discardPoint("web", P2)).rejects.toMatchObject({ code: "TM_POINT_COMMITTED" });
    expect(await keysOf("web/")).toEqual([`web/${P2}/point.json`, `web/${P2}/sda.qcow2`]);
  });

  it("discardPoint() believes a listing that shows a manifest which was not there a moment ago", async () => {
    await writePoint(repository, { machine: "web", id: P1, disks: [disk()] });
    const get = storage.get.bind(storage);
    storage.get = async (key, options) => get(key.replace("point.json", "not-seen-yet"), options);
    await expect(repository.discardPoint("web", P1)).rejects.toMatchObject({ code: "TM_POINT_COMMITTED" });
    expect(await keysOf("web/")).toEqual([`web/${P1}/point.json`, `web/${P1}/sda.qcow2`]);
  });

  it("collectGarbage() removes what dead runs left, and nothing else", async () => {
    await chainOfThree();
    await writeImages(repository, { machine: "web", id: P4, disks: [disk()] });
    await storage.put("web/notes/readme.txt", Buffer.from("mine"));
    await using lock = await repository.lockMachine("web");
    const before = await keysOf();
    const { removed, kept } = await repository.collectGarbage("web", lock);
    expect({ removed, kept }).toEqual({ removed: [P4], kept: [] });
    expect(await keysOf()).toEqual(before.filter((key) => !key.includes(P4)));
  });

  it("collectGarbage() keeps images that a manifest or a kept image needs, though their manifests are lost", async () => {
    await chainOfThree();
    await writeImages(repository, { machine: "web", id: P4, disks: [disk()] });
    await storage.delete(`web/${P1}/point.json`);
    await storage.delete(`web/${P2}/point.json`);
    await using lock = await repository.lockMachine("web");
    const { removed, kept } = await repository.collectGarbage("web", lock);
    expect(removed).toEqual([P4]);
    expect(kept.map(({ id }) => id)).toEqual([P2, P1]);
    expect(await keysOf("web/")).toContain(`web/${P1}/sda.qcow2`);
  });

  it("collectGarbage() removes nothing when what is needed cannot be known", async () => {
    await chainOfThree();
    await writeImages(repository, { machine: "web", id: P4, disks: [disk()] });
    await storage.put(`web/${P3}/point.json`, Buffer.from("{"));
    await using lock = await repository.lockMachine("web");
    const before = await keysOf();
    const { removed, kept } = await repository.collectGarbage("web", lock);
    expect(removed).toEqual([]);
    expect(kept.map(({ id }) => id)).toEqual([P4]);
    await storage.delete(`web/${P3}/point.json`);
    await storage.delete(`web/${P2}/point.json`);
    // Nobody needs P2 and P3 any more; P1 has its manifest.
    expect((await repository.collectGarbage("web", lock)).removed).toEqual([P2, P3, P4]);
    expect(await keysOf()).toEqual(before.filter((key) => !/-00000[234]/.test(key)));
  });

  it("collectGarbage() stops when the lock is lost, and wants this machine's lock", async () => {
    await writeImages(repository, { machine: "web", id: P4, disks: [disk()] });
    await using lock = await repository.lockMachine("web");
    await using other = await repository.lockMachine("db");
    await expect(repository.collectGarbage("web", other)).rejects.toThrow(RangeError);
    await storage.delete("web/lock");
    await expect(repository.collectGarbage("web", lock)).rejects.toThrow(FencedError);
    expect(await keysOf("web/")).toEqual([`web/${P4}/sda.qcow2`]);
  });
});
