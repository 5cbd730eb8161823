import { randomBytes, randomInt } from "node:crypto";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { DamageError, NotFoundError } from "../../src/errors/index.js";
import {
  initRepository,
  openRepository,
  type DiskManifest,
  type PointManifest,
  type Repository,
} from "../../src/repository/index.js";
import { MemoryStorage } from "../../src/storage/index.js";
import { SegmentChecker } from "../../src/transfer/index.js";
import { verifyMachine, type VerifyReport } from "../../src/verify/index.js";
import { pointId, writePoint, type DiskContent } from "../interop/repository-points.js";

const CLUSTER = 4 * KiB;
const [P1, P2, P3, P4, P5] = [1, 2, 3, 4, 5].map(pointId) as [string, string, string, string, string];
const POINTS = [P1, P2, P3, P4, P5];

const ZSTD_MAGIC = Buffer.from([0x28, 0xb5, 0x2f, 0xfd]);

/** Everything in a storage, by key. */
type Files = Map<string, Buffer>;

let pristine: Files;
/** What each disk held, by "<point>/<disk>". */
const contents = new Map<string, Buffer>();
let manifests: ReadonlyMap<string, PointManifest>;
let checker: SegmentChecker;

/**
 * A machine with two disks and a branch, P1 <- P2 <- P3 and P2 <- P4 <- P5; at P5 disk "a" is full again. A machine "db" has a
 * point of the same id, with disks of the same names and tokens.
 */
beforeAll(async () => {
  const storage = new MemoryStorage();
  const repository = await initRepository(storage);
  const made = new Map<string, PointManifest>();
  const parents: Record<string, string | null> = { [P1]: null, [P2]: P1, [P3]: P2, [P4]: P2, [P5]: P4 };
  for (const id of POINTS) {
    const parent = parents[id] == null ? undefined : made.get(parents[id]);
    const disks = ["a", "b"].map((name) => {
      const isFull = parent === undefined || (id === P5 && name === "a");
      return contentOf(name, id, isFull ? undefined : parent);
    });
    made.set(id, await writePoint(repository, { machine: "web", id, disks, parent: parent?.id ?? null }));
  }
  const [a, b] = [contentOf("a", P1, undefined, false), contentOf("b", P1, undefined, false)];
  await writePoint(repository, { machine: "db", id: P1, disks: [a, b] });
  manifests = made;
  pristine = await filesOf(storage);
  checker = SegmentChecker.start(2);
});

afterAll(async () => {
  await checker.stop();
});

/** Some clusters of a disk, never all: what its parent held shines through. */
function contentOf(name: string, id: string, parent: PointManifest | undefined, kept = true): DiskContent {
  const size = name === "a" ? 40 * CLUSTER : 21 * CLUSTER + 512;
  const content = Buffer.alloc(size);
  if (parent !== undefined) contents.get(`${parent.id}/${name}`)?.copy(content);
  const data = new Map<number, Buffer>();
  const zero: number[] = [];
  for (let cluster = 0; cluster * CLUSTER < size; cluster += 1) {
    const part = content.subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER);
    const choice = randomInt(parent === undefined ? 2 : 5);
    if (choice === 0) {
      data.set(
        cluster,
        cluster % 2 === 0 ? randomBytes(part.length) : Buffer.alloc(part.length, `${id} ${cluster}`),
      );
      part.set(data.get(cluster) ?? []);
    } else if (choice === 1 && parent !== undefined) {
      zero.push(cluster);
      part.fill(0);
    }
  }
  if (kept) contents.set(`${id}/${name}`, content);
  const token = name === "a" ? "0000000a" : "0000000b";
  return { name, token, virtualSize: size, clusterSize: CLUSTER, data, zero, parent };
}

async function filesOf(storage: MemoryStorage): Promise<Files> {
  const files: Files = new Map();
  for await (const { key } of storage.list(""))
    files.set(key, await storage.get(key, { maxLength: 1 << 30 }));
  return files;
}

const imageKey = (id: string, disk: string): string => `web/${id}/${disk}.qcow2`;
const manifestKey = (id: string): string => `web/${id}/point.json`;
const diskOf = (id: string, name: string): DiskManifest =>
  manifests.get(id)!.disks.find((disk) => disk.name === name)!;

/** A repository with these files, changed. */
async function damaged(change: (files: Files) => void): Promise<Repository> {
  const files: Files = new Map([...pristine].map(([key, bytes]) => [key, Buffer.from(bytes)]));
  change(files);
  const storage = new MemoryStorage();
  for (const [key, bytes] of files) await storage.put(key, bytes);
  return await openRepository(storage);
}

/** The points that cannot be restored. @throws when one restores to other bytes than it held */
async function lostPoints(repository: Repository): Promise<Set<string>> {
  const lost = new Set<string>();
  for (const id of POINTS) {
    for (const name of ["a", "b"]) {
      try {
        const chain = await repository.openChain("web", id, name);
        try {
          const read = await chain.chain.read(0, chain.chain.virtualSize);
          if (!read.equals(contents.get(`${id}/${name}`)!))
            throw new Error(`${id}/${name} reads wrong bytes`);
        } finally {
          await chain.close();
        }
      } catch (error) {
        // A manifest that holds the disk no more says nothing about it.
        if (error instanceof NotFoundError) continue;
        if (!(error instanceof DamageError)) throw error;
        lost.add(id);
      }
    }
  }
  return lost;
}

async function verify(repository: Repository, share = 1, point?: string): Promise<VerifyReport> {
  return await verifyMachine({ repository, machine: "web", share, point, checker });
}

const affectedBy = ({ problems }: VerifyReport): Set<string> =>
  new Set(problems.flatMap(({ affects }) => affects));

type Damage = readonly [what: string, change: (files: Files) => void];

/** Flips one bit somewhere in a range of a file. */
function flip(files: Files, key: string, from: number, length: number): void {
  const at = from + randomInt(length);
  files.get(key)![at]! ^= 1 << randomInt(8);
}

function edit(files: Files, id: string, change: (manifest: Record<string, unknown>) => void): void {
  const manifest = JSON.parse(files.get(manifestKey(id))!.toString()) as Record<string, unknown>;
  change(manifest);
  files.set(manifestKey(id), Buffer.from(JSON.stringify(manifest)));
}

const disksOf = (manifest: Record<string, unknown>): Record<string, unknown>[] =>
  manifest["disks"] as Record<string, unknown>[];

const IMAGES = POINTS.flatMap((id) => ["a", "b"].map((disk) => [id, disk] as const));

/** Damages of anything but the frames. */
function structural(): Damage[] {
  return [
    ...IMAGES.flatMap(([id, disk]) => {
      const key = imageKey(id, disk);
      const { segments, bytes } = diskOf(id, disk);
      const set = (change: (image: Buffer) => Buffer) => (files: Files) =>
        void files.set(key, change(files.get(key)!));
      return [
        ...segments
          .filter(({ kind }) => kind !== "data")
          .map(({ kind, offset, length }): Damage => [
            `a bit of the ${kind} at ${offset} of ${key}`,
            (files) => flip(files, key, offset, length),
          ]),
        [`a bit of the header's fields of ${key}`, (files) => flip(files, key, 0, 104)],
        [`a byte less of ${key}`, set((image) => image.subarray(0, bytes - 1))],
        [`a cluster less of ${key}`, set((image) => image.subarray(0, bytes - CLUSTER))],
        [`nothing of ${key}`, set(() => Buffer.alloc(0))],
        [`a byte more of ${key}`, set((image) => Buffer.concat([image, Buffer.alloc(1)]))],
        [`a cluster more of ${key}`, set((image) => Buffer.concat([image, Buffer.alloc(CLUSTER)]))],
        [`zeroes of ${key}`, set((image) => Buffer.alloc(image.length))],
        [`${key} gone`, (files) => void files.delete(key)],
      ] as Damage[];
    }),
    ...POINTS.slice(1).flatMap((id): Damage[] => [
      [
        `another name of the backing file of a of ${id}`,
        (files) => {
          const image = files.get(imageKey(id, "a"))!;
          const at = image.readUInt32BE(12);
          if (at > 0) image.write("./", at);
          else flip(files, imageKey(id, "a"), 0, CLUSTER);
        },
      ],
      [
        `another backing file of a of ${id}`,
        (files) => {
          const image = files.get(imageKey(id, "a"))!;
          const at = image.readUInt32BE(12);
          if (at > 0) image.write(id === P2 ? P5 : P1, at + 3);
          else flip(files, imageKey(id, "a"), 0, CLUSTER);
        },
      ],
    ]),
    ["a of two points swapped", (files) => swap(files, imageKey(P2, "a"), imageKey(P3, "a"))],
    ["a of two branches swapped", (files) => swap(files, imageKey(P3, "a"), imageKey(P4, "a"))],
    ["the disks of a point swapped", (files) => swap(files, imageKey(P2, "a"), imageKey(P2, "b"))],
    [
      "an older full image in a's place",
      (files) => void files.set(imageKey(P5, "a"), files.get(imageKey(P1, "a"))!),
    ],
    ["another machine's image", (files) => void files.set(imageKey(P1, "a"), files.get(`db/${P1}/a.qcow2`)!)],
    [
      "another machine's point",
      (files) => {
        for (const name of ["a.qcow2", "b.qcow2", "point.json"])
          files.set(`web/${P1}/${name}`, files.get(`db/${P1}/${name}`)!);
      },
    ],
    [
      "another machine's manifest",
      (files) => void files.set(manifestKey(P1), files.get(`db/${P1}/point.json`)!),
    ],
    ["another point's manifest", (files) => void files.set(manifestKey(P4), files.get(manifestKey(P3))!)],
    [
      "another machine's manifest that says it is this one's",
      (files) => {
        files.set(manifestKey(P1), files.get(`db/${P1}/point.json`)!);
        edit(
          files,
          P1,
          (manifest) => void ((manifest["machine"] as Record<string, unknown>)["name"] = "web"),
        );
      },
    ],
    ...[P1, P2, P4].map((id): Damage => [
      `the manifest of ${id} gone`,
      (files) => void files.delete(manifestKey(id)),
    ]),
    ...[P1, P2, P4].map((id): Damage => [
      `all of ${id} gone`,
      (files) => {
        for (const key of [...files.keys()]) if (key.startsWith(`web/${id}/`)) files.delete(key);
      },
    ]),
    [
      "half a manifest",
      (files) => void files.set(manifestKey(P2), files.get(manifestKey(P2))!.subarray(0, 700)),
    ],
    ["an empty manifest", (files) => void files.set(manifestKey(P2), Buffer.alloc(0))],
    [
      "a manifest without its second disk",
      (files) => edit(files, P2, (manifest) => void disksOf(manifest).pop()),
    ],
    [
      "a manifest that skips its parent",
      (files) => edit(files, P3, (manifest) => disksOf(manifest).forEach((disk) => (disk["parent"] = P1))),
    ],
    [
      "a manifest of another branch",
      (files) => edit(files, P5, (manifest) => (disksOf(manifest)[1]!["parent"] = P3)),
    ],
    [
      "a manifest with another token",
      (files) =>
        edit(files, P3, (manifest) => {
          Object.assign(disksOf(manifest)[0]!, { token: "0000000c", bitmap: null });
        }),
    ],
    [
      "a manifest that calls an increment full",
      (files) =>
        edit(files, P3, (manifest) => {
          Object.assign(disksOf(manifest)[0]!, { kind: "full", parent: null, reason: "no" });
        }),
    ],
    [
      "a manifest of a shorter disk",
      (files) =>
        edit(files, P3, (manifest) => {
          Object.assign(disksOf(manifest)[0]!, { virtualSize: 39 * CLUSTER });
        }),
    ],
    [
      "a manifest that counts otherwise",
      (files) =>
        edit(files, P3, (manifest) => {
          const disk = disksOf(manifest)[0]!;
          disk["zeroClusters"] = (disk["zeroClusters"] as number) + 1;
        }),
    ],
  ];
}

function swap(files: Files, one: string, other: string): void {
  const [first, second] = [files.get(one)!, files.get(other)!];
  files.set(one, second).set(other, first);
}

describe("verifyMachine()", () => {
  it("accuses nothing of a sound repository, also where files lie about that are nobody's", async () => {
    const repository = await damaged((files) => {
      files
        .set(`web/${P2}/notes.txt`, Buffer.from("hello"))
        .set(`web/${pointId(9)}/a.qcow2`, Buffer.alloc(100));
      files.set("web/lock", Buffer.from("{}"));
    });
    expect(await lostPoints(repository)).toEqual(new Set());
    expect(await verify(repository)).toEqual({ points: 5, problems: [] });
  });

  it(
    "finds damage of all that is no frame, --quick too, and says exactly which points it costs",
    { timeout: 120_000 },
    async () => {
      for (const [what, change] of structural()) {
        const repository = await damaged(change);
        const lost = await lostPoints(repository);
        for (const share of [0, 1]) {
          const report = await verify(repository, share);
          const said = {
            what,
            share,
            found: report.problems.length > 0,
            affects: [...affectedBy(report)].sort(),
          };
          expect.soft(said).toEqual({ what, share, found: true, affects: [...lost].sort() });
        }
      }
    },
  );

  it("finds damage of frames wherever it is, and says which points read them: not those that have replaced them", async () => {
    let spared = 0;
    for (const [id, disk] of IMAGES) {
      const key = imageKey(id, disk);
      for (const { kind, offset, length } of diskOf(id, disk).segments) {
        if (kind !== "data") continue;
        for (let round = 0; round < 4; round += 1) {
          const repository = await damaged((files) => flip(files, key, offset, length));
          const lost = await lostPoints(repository);
          const report = await verify(repository);
          expect(report.problems).toMatchObject([{ point: id, disk }]);
          // A bit that no decoder looks at: then any of the segment's clusters may be meant.
          const said = lost.size === 0 ? lost : affectedBy(report);
          expect({ key, affects: [...said] }).toEqual({ key, affects: [...lost].sort() });
          expect(await verify(repository, 0)).toMatchObject({ problems: [] });
          // Of one point alone: what it needs.
          for (const point of POINTS) {
            const isNeeded = (await verify(repository, 1, point)).problems.length > 0;
            if (lost.has(point)) expect(isNeeded).toBe(true);
          }
          if (!lost.has(P5) || !lost.has(P3)) spared += 1;
        }
      }
    }
    expect(spared).toBeGreaterThan(0);
  });

  it("takes all clusters of a segment for lost in which sound frames stand in each other's places", async () => {
    const key = imageKey(P1, "a");
    const { offset, length } = diskOf(P1, "a").segments.find(({ kind }) => kind === "data")!;
    const repository = await damaged((files) => {
      const segment = files.get(key)!.subarray(offset, offset + length);
      const starts: number[] = [];
      for (let at = 0; at >= 0; at = segment.indexOf(ZSTD_MAGIC, at + 1)) starts.push(at);
      // Noise does not compress: frames of it are of one length.
      const frames = starts.map((start, index) => segment.subarray(start, starts[index + 1]));
      const [one, other] = frames.filter((frame) => frame.length > CLUSTER && frame.length < CLUSTER + 32);
      const held = Buffer.from(one!);
      one!.set(other!);
      other!.set(held);
    });
    const report = await verify(repository);
    expect(report.problems).toMatchObject([{ point: P1, disk: "a" }]);
    const chain = await repository.openChain("web", P1, "a");
    expect((await chain.chain.read(0, 40 * CLUSTER)).equals(contents.get(`${P1}/a`)!)).toBe(false);
    await chain.close();
    expect(affectedBy(report).has(P1)).toBe(true);
  });

  it("reads each image once, however many points need it, and of one point only what that needs", async () => {
    const reads = new Map<string, number>();
    const storage = new MemoryStorage();
    for (const [key, bytes] of pristine) await storage.put(key, bytes);
    const open = storage.open.bind(storage);
    storage.open = async (key, options) => {
      const reader = await open(key, options);
      const read = reader.read.bind(reader);
      return Object.assign(reader, {
        read: async (offset: number, length: number, io?: object) => {
          if (offset > 0) reads.set(key, (reads.get(key) ?? 0) + length);
          return await read(offset, length, io);
        },
      });
    };
    const repository = await openRepository(storage);
    const frames = (id: string, disk: string): number =>
      diskOf(id, disk).segments.reduce((sum, { kind, length }) => sum + (kind === "data" ? length : 0), 0);
    await verify(repository);
    for (const [id, disk] of IMAGES) {
      // Tables are read some times, frames once.
      const [all, tables] = [diskOf(id, disk).bytes, diskOf(id, disk).bytes - frames(id, disk)];
      expect(reads.get(imageKey(id, disk))).toBeGreaterThanOrEqual(all - CLUSTER);
      expect(reads.get(imageKey(id, disk))).toBeLessThan(frames(id, disk) + 5 * tables);
    }
    reads.clear();
    expect(await verify(repository, 1, P3)).toEqual({ points: 3, problems: [] });
    expect(new Set([...reads.keys()].map((key) => key.split("/")[1]))).toEqual(new Set([P1, P2, P3]));
  });
});
