import { beforeEach, describe, expect, it } from "vitest";
import { pointId, writeImages, writePoint, type DiskContent } from "../../test/interop/repository-points.js";
import { KiB } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
import { ClusterHasher, HASH_BYTES, newHashKey } from "../hashes/index.js";
import { MemoryStorage } from "../storage/index.js";
import type { PointManifest } from "./manifest.js";
import { PointHashes } from "./point-hashes.js";
import { initRepository, type Repository } from "./repository.js";

const [P1, P2] = [1, 2].map(pointId) as [string, string];
const CLUSTER = 64 * KiB;
const KEY = newHashKey();
const fence = (): Promise<void> => Promise.resolve();

let storage: MemoryStorage;
let repository: Repository;

beforeEach(async () => {
  storage = new MemoryStorage();
  repository = await initRepository(storage);
});

function disk(data: Record<number, string>, more: Partial<DiskContent> = {}): DiskContent {
  const clusters = Object.entries(data).map(
    ([cluster, text]) => [Number(cluster), Buffer.from(text)] as const,
  );
  return { name: "sda", token: "00c0ffee", virtualSize: 1 << 20, data: new Map(clusters), ...more };
}

function hashOf(text: string, key = KEY): Buffer {
  const cluster = Buffer.alloc(CLUSTER);
  cluster.write(text);
  return new ClusterHasher(key).hash(cluster);
}

/** Writes a point's image and hashes. @returns its manifest, not committed */
async function write(id: string, content: DiskContent, key = KEY): Promise<PointManifest> {
  const manifest = await writeImages(repository, { machine: "web", id, disks: [content] });
  const { name, token, virtualSize } = content;
  const image = { machine: "web", point: id, disk: name, token, virtualSize, clusterSize: CLUSTER };
  const writer = await repository.createHashes(image, key);
  for (const [cluster, text] of content.data) writer.add([cluster], hashOf(text.toString(), key));
  for (const cluster of content.zero ?? []) writer.zero(cluster, 1);
  const hashes = { file: `${name}.hashes`, ...(await writer.finish()) };
  return { ...manifest, disks: manifest.disks.map((one) => ({ ...one, hashes })) };
}

async function commit(id: string, content: DiskContent, key = KEY): Promise<PointManifest> {
  const manifest = await write(id, content, key);
  await repository.commitPoint(manifest, { fence });
  return manifest;
}

async function comparisonOf(id: string): Promise<PointHashes | string> {
  const opened = await repository.openComparison("web", id, "sda");
  if (typeof opened === "string") return opened;
  await opened.chain.close();
  return opened.hashes;
}

describe("openComparison()", () => {
  it("says of each cluster what the chain holds", async () => {
    const first = await commit(P1, disk({ 0: "a", 1: "b", 2: "c" }));
    await commit(P2, disk({ 1: "B" }, { parent: first, zero: [2] }));
    const hashes = await comparisonOf(P2);
    if (!(hashes instanceof PointHashes)) throw new Error(hashes);
    const { states, hashes: found } = await hashes.window(0, 4);
    expect([...states]).toEqual([1, 1, 0, 0]);
    expect(found.subarray(0, 2 * HASH_BYTES)).toEqual(
      new Uint8Array(Buffer.concat([hashOf("a"), hashOf("B")])),
    );
    await hashes.close();
  });

  it("says why it cannot be", async () => {
    const first = await writePoint(repository, { machine: "web", id: P1, disks: [disk({ 0: "a" })] });
    expect(await comparisonOf(P1)).toBe(`point ${P1} has no hashes`);
    await commit(P2, disk({ 0: "A" }, { parent: first }));
    expect(await comparisonOf(P2)).toBe(`point ${P1} has no hashes`);
    await storage.delete(`web/${P1}/sda.qcow2`);
    expect(await comparisonOf(P2)).toMatch(/^parent damaged: .*is missing/);
  });

  it("does not mix hashes of different keys", async () => {
    const first = await commit(P1, disk({ 0: "a" }));
    await commit(P2, disk({ 0: "A" }, { parent: first }), newHashKey());
    expect(await comparisonOf(P2)).toBe("the hashes of its chain have different keys");
  });

  it("throws what is no damage", async () => {
    await commit(P1, disk({ 0: "a" }));
    const open = storage.open.bind(storage);
    storage.open = (key, options) =>
      key.endsWith(".hashes") ? Promise.reject(new Error("no route to host")) : open(key, options);
    await expect(comparisonOf(P1)).rejects.toThrow("no route to host");
  });
});

describe("commitPoint()", () => {
  const key = `web/${P1}/sda.hashes`;
  it.each<[string, (bytes: Buffer) => Promise<unknown>]>([
    ["missing", () => storage.delete(key)],
    ["short", (bytes) => storage.put(key, bytes.subarray(0, -1))],
    [
      "changed",
      (bytes) => storage.put(key, Buffer.from(bytes.toString("latin1").replace("tide", "ebbs"), "latin1")),
    ],
  ])("refuses a point whose hashes are %s", async (_what, damage) => {
    const manifest = await write(P1, disk({ 0: "a" }));
    await damage(await storage.get(key, { maxLength: 1 << 20 }));
    await expect(repository.commitPoint(manifest, { fence })).rejects.toThrow(DamageError);
    expect(await repository.points("web")).toEqual([]);
  });
});

describe("garbage", () => {
  it("goes with its hashes, and hashes keep no garbage alive", async () => {
    const first = await commit(P1, disk({ 0: "a" }));
    await commit(P2, disk({ 0: "A" }, { parent: first }));
    await write(pointId(3), disk({ 0: "x" }));
    // What P2 is an increment of lost its manifest: it stays, and what nobody needs goes.
    await storage.delete(`web/${P1}/point.json`);
    await using lock = await repository.lockMachine("web");
    const { removed, kept } = await repository.collectGarbage("web", lock);
    expect(removed).toEqual([pointId(3)]);
    expect(kept.map(({ id }) => id)).toEqual([P1]);
    const left: string[] = [];
    for await (const { key } of storage.list("web/")) left.push(key);
    expect(left.filter((key) => key.endsWith(".hashes")).sort()).toEqual([
      `web/${P1}/sda.hashes`,
      `web/${P2}/sda.hashes`,
    ]);
    expect(left.some((key) => key.includes(pointId(3)))).toBe(false);
  });
});
