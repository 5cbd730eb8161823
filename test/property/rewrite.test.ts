import { createHash } from "node:crypto";
import { mkdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { CLUSTER_DATA, ClusterHasher, HASH_BYTES, newHashKey } from "../../src/hashes/index.js";
import {
  initRepository,
  openRepository,
  PointHashes,
  type PointManifest,
  type Repository,
} from "../../src/repository/index.js";
import {
  descendantsOf,
  planFlatten,
  planRemoval,
  removePoints,
  rewriteImages,
  type RewriteContext,
} from "../../src/rewrite/index.js";
import { MemoryStorage, type Storage } from "../../src/storage/index.js";
import { pointId, writeImages, type DiskContent } from "../interop/repository-points.js";
import { Crash, CrashingStorage } from "../support/crashing-storage.js";
import { checkImage, CLEAN, sha256OfFile, toRaw } from "../support/image.js";
import { resized } from "../support/qcow2.js";
import { temporaryDirectory } from "../support/temporary.js";

const CLUSTER = 4 * KiB;
const MACHINE = "web";
const RUNS = process.env["TIDEMARK_SOAK"] === undefined ? 120 : 3000;
const fence = (): Promise<void> => Promise.resolve();

type Step =
  | {
      readonly kind: "backup";
      readonly parent: number;
      readonly full: boolean;
      readonly disks: readonly DiskStep[];
    }
  | {
      readonly kind: "remove";
      readonly points: readonly number[];
      readonly tree: boolean;
      readonly crash: number | null;
    }
  | { readonly kind: "flatten"; readonly point: number; readonly crash: number | null };

interface DiskStep {
  readonly sectors: number | null;
  readonly writes: readonly {
    readonly place: number;
    readonly run: number;
    readonly content: "zero" | number;
  }[];
}

const diskStep: fc.Arbitrary<DiskStep> = fc.record({
  // Mostly as before; else sizes that end inside the same clusters as others, and far away.
  sectors: fc.oneof(
    { arbitrary: fc.constant(null), weight: 3 },
    fc.integer({ min: 96, max: 106 }),
    fc.nat(600 * 8),
  ),
  writes: fc.array(
    fc.record({
      place: fc.oneof(
        { arbitrary: fc.double({ min: 0, max: 0.999, noNaN: true }), weight: 3 },
        fc.constant(0.999),
      ),
      run: fc.integer({ min: 1, max: 4 }),
      content: fc.oneof(fc.constant<"zero">("zero"), { arbitrary: fc.nat(255), weight: 3 }),
    }),
    { maxLength: 6 },
  ),
});
const crash = fc.option(fc.nat(60), { freq: 2 });
const steps = fc.array(
  fc.oneof(
    {
      weight: 5,
      arbitrary: fc.record({
        kind: fc.constant("backup" as const),
        parent: fc.oneof({ arbitrary: fc.constant(0), weight: 3 }, fc.nat()),
        full: fc.oneof({ arbitrary: fc.constant(false), weight: 5 }, fc.constant(true)),
        disks: fc.array(diskStep, { minLength: 2, maxLength: 2 }),
      }),
    },
    {
      weight: 3,
      arbitrary: fc.record({
        kind: fc.constant("remove" as const),
        points: fc.array(fc.nat(), { minLength: 1, maxLength: 3 }),
        tree: fc.oneof({ arbitrary: fc.constant(false), weight: 6 }, fc.constant(true)),
        crash,
      }),
    },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant("flatten" as const), point: fc.nat(), crash }) },
  ),
  { minLength: 3, maxLength: 14 },
);

/** The repository, and what every point in it must read as. */
class World {
  readonly storage = new MemoryStorage();
  readonly models = new Map<string, ReadonlyMap<string, Buffer>>();
  readonly #keys = new Map<string, Buffer>();
  #number = 0;
  crashes = 0;
  merges = 0;

  static async create(): Promise<World> {
    const world = new World();
    await initRepository(world.storage);
    return world;
  }

  async open(storage: Storage = this.storage): Promise<Repository> {
    return await openRepository(storage);
  }

  async apply(step: Step): Promise<void> {
    switch (step.kind) {
      case "backup": {
        await this.#backup(step);
        return;
      }
      case "remove": {
        await this.#rewrite(step.crash, async (repository, ids) => {
          const chosen = new Set(step.points.map((seed) => ids[seed % ids.length]!));
          const { points } = await repository.survey(MACHINE);
          if (step.tree)
            for (const id of [...chosen]) for (const below of descendantsOf(points, id)) chosen.add(below);
          const plan = planRemoval(points, chosen);
          this.merges += plan.merges.length;
          for (const id of chosen) this.models.delete(id);
          await removePoints(plan, "the points before it were deleted", contextOf(repository));
        });
        return;
      }
      case "flatten": {
        await this.#rewrite(step.crash, async (repository, ids) => {
          const { points } = await repository.survey(MACHINE);
          const merges = planFlatten(points, ids[step.point % ids.length]!);
          this.merges += merges.length;
          await rewriteImages(merges, "flattened", contextOf(repository));
        });
        return;
      }
    }
  }

  async #backup({ parent: seed, full, disks }: Extract<Step, { kind: "backup" }>): Promise<void> {
    const repository = await this.open();
    const { points } = await repository.survey(MACHINE);
    const parent = points.length === 0 || full ? undefined : points.at(-1 - (seed % points.length));
    const id = pointId((this.#number += 1));
    const models = new Map<string, Buffer>();
    const contents: DiskContent[] = disks.map((disk, index) => {
      const token = `${index}`.repeat(8);
      const before = parent === undefined ? Buffer.alloc(0) : this.models.get(parent.id)!.get(token)!;
      const virtualSize =
        disk.sectors === null ? (parent === undefined ? 100 * 512 : before.length) : disk.sectors * 512;
      const model = resized(before, virtualSize);
      const clusters = clustersOf(disk, model, id);
      models.set(token, model);
      const data = new Map([...clusters].filter((entry): entry is [number, Buffer] => entry[1] !== "zero"));
      const zero = [...clusters].flatMap(([cluster, content]) => (content === "zero" ? [cluster] : []));
      return { name: `disk${index}`, token, virtualSize, clusterSize: CLUSTER, data, zero, parent };
    });
    const manifest = await writeImages(repository, {
      machine: MACHINE,
      id,
      parent: parent?.id ?? null,
      disks: contents,
    });
    const hashed = { ...manifest, disks: [] as PointManifest["disks"][number][] };
    for (const [index, disk] of manifest.disks.entries()) {
      hashed.disks.push({
        ...disk,
        hashes: await this.#writeHashes(repository, id, contents[index]!, parent),
      });
    }
    await repository.commitPoint(hashed, { fence });
    this.models.set(id, models);
  }

  async #writeHashes(
    repository: Repository,
    point: string,
    content: DiskContent,
    parent: PointManifest | undefined,
  ): Promise<NonNullable<PointManifest["disks"][number]["hashes"]>> {
    const { name: disk, token, virtualSize, data, zero = [] } = content;
    const key = parent === undefined ? newHashKey() : this.#keys.get(`${parent.id} ${token}`)!;
    this.#keys.set(`${point} ${token}`, key);
    const image = { machine: MACHINE, point, disk, token, virtualSize, clusterSize: CLUSTER };
    const writer = await repository.createHashes(image, key);
    const hasher = new ClusterHasher(key);
    for (const [cluster, bytes] of data) writer.add([cluster], hasher.hash(resized(bytes, CLUSTER)));
    for (const cluster of zero) writer.zero(cluster, 1);
    return { file: `${disk}.hashes`, ...(await writer.finish()) };
  }

  /** Does something to the chain, dying on the way if it is to; then once more to its end. */
  async #rewrite(
    crashAt: number | null,
    work: (repository: Repository, ids: readonly string[]) => Promise<void>,
  ): Promise<void> {
    const before = new Map(this.models);
    const ids = [...this.models.keys()];
    if (ids.length === 0) return;
    if (crashAt !== null) {
      const dying = new CrashingStorage(this.storage, crashAt);
      const outcome = await work(await this.open(dying), ids).catch((error: unknown) => error);
      if (!dying.hasCrashed) {
        expect(outcome).toBeUndefined();
        return;
      }
      expect(outcome).toBeInstanceOf(Crash);
      this.crashes += 1;
      // Points that were to go may be there still: then they read as before.
      const { points } = await (await this.open()).survey(MACHINE);
      for (const { id } of points) this.models.set(id, before.get(id)!);
      await this.expectAll();
      await (await this.open()).finishRewrites(MACHINE, { fence });
      await this.expectAll();
      if (points.length === 0) return;
    }
    const left = ids.filter((id) => this.models.has(id) || before.has(id));
    const { points } = await (await this.open()).survey(MACHINE);
    const there = left.filter((id) => points.some((point) => point.id === id));
    if (there.length > 0) await work(await this.open(), there);
  }

  /** Every point that must be there is, and reads as it must; its hashes are those of what it holds. */
  async expectAll(): Promise<void> {
    const repository = await this.open();
    const { points, unreadable } = await repository.survey(MACHINE);
    expect(unreadable).toEqual([]);
    expect(points.map(({ id }) => id)).toEqual([...this.models.keys()].sort());
    for (const point of points) {
      for (const { name, token } of point.disks) {
        const model = this.models.get(point.id)!.get(token)!;
        const chain = await repository.openChain(MACHINE, point.id, name);
        expect(chain.chain.virtualSize).toBe(model.length);
        expect((await chain.chain.read(0, model.length)).equals(model), `${point.id} ${name}`).toBe(true);
        const hashes = await repository.openHashes(chain);
        if (!(hashes instanceof PointHashes)) throw new Error(hashes);
        await expectHashes(hashes, model);
        await hashes.close();
        await chain.close();
      }
    }
  }

  /** As a directory, for tools that know nothing of tidemark. */
  async dump(directory: string): Promise<void> {
    for await (const { key } of this.storage.list("")) {
      const path = join(directory, key);
      await mkdir(dirname(path), { recursive: true });
      await writeFile(path, await this.storage.get(key, { maxLength: 2 ** 30 }));
    }
  }
}

function contextOf(repository: Repository): RewriteContext {
  return { repository, machine: MACHINE, fence, level: 1 };
}

/** Lays writes over a model. @returns what an image stores of them, padded with zeroes as backups are */
function clustersOf({ writes }: DiskStep, model: Buffer, seed: string): Map<number, Buffer | "zero"> {
  const all = Math.ceil(model.length / CLUSTER);
  const clusters = new Map<number, Buffer | "zero">();
  for (const { place, run, content } of writes) {
    const first = Math.floor(place * all);
    for (let cluster = first; cluster < Math.min(first + run, all); cluster += 1) {
      const end = Math.min((cluster + 1) * CLUSTER, model.length);
      const part = model.subarray(cluster * CLUSTER, end);
      if (content === "zero") part.fill(0);
      else part.fill(createHash("sha512").update(`${seed} ${content} ${cluster}`).digest());
      clusters.set(cluster, content === "zero" ? "zero" : Buffer.from(part));
    }
  }
  return clusters;
}

async function expectHashes(hashes: PointHashes, model: Buffer): Promise<void> {
  const count = Math.ceil(model.length / CLUSTER);
  const window = await hashes.window(0, count);
  const hasher = new ClusterHasher(hashes.key);
  for (let cluster = 0; cluster < count; cluster += 1) {
    const content = Buffer.alloc(CLUSTER);
    model.copy(content, 0, cluster * CLUSTER);
    const state = window.states[cluster];
    if (state === CLUSTER_DATA) {
      const hash = window.hashes.subarray(cluster * HASH_BYTES, (cluster + 1) * HASH_BYTES);
      expect(hasher.hash(content).equals(hash)).toBe(true);
    } else if (state === 0) expect(content.every((byte) => byte === 0)).toBe(true);
  }
}

describe("removePoints() and rewriteImages()", () => {
  it("keep every point that is kept as it reads, in random trees, whenever they die", async () => {
    await using directory = await temporaryDirectory();
    let runs = 0;
    let crashes = 0;
    let merges = 0;
    const property = fc.asyncProperty(steps, async (story) => {
      runs += 1;
      const world = await World.create();
      for (const step of story) {
        await world.apply(step);
        await world.expectAll();
      }
      crashes += world.crashes;
      merges += world.merges;
      if (runs % 10 > 0) return;
      const root = directory.file(String(runs));
      await mkdir(root);
      await world.dump(root);
      for (const [id, disks] of world.models) {
        for (const [token, model] of disks) {
          const path = join(root, MACHINE, id, `disk${token[0]!}.qcow2`);
          const { report, ...found } = await checkImage(path);
          expect(found, report).toEqual(CLEAN);
          const raw = await toRaw(path, "qcow2", directory.file("raw"));
          expect(await sha256OfFile(raw)).toBe(createHash("sha256").update(model).digest("hex"));
        }
      }
    });
    await fc.assert(property, { numRuns: RUNS });
    expect(Math.min(crashes, merges)).toBeGreaterThan(RUNS / 4);
  }, 900_000);
});
