/** Repositories for tests of rewriting: trees of points of one disk, with the raw content of each beside them. */
import { randomBytes } from "node:crypto";
import { readdir } from "node:fs/promises";
import { expect } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { initRepository, type PointManifest, type Repository } from "../../src/repository/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { checkImage, CLEAN, compareImages, toRaw } from "../support/image.js";
import { pointId, writePoint } from "./repository-points.js";

export const CLUSTER = 64 * KiB;
export const MACHINE = "web";

/** Incompressible clusters, of which no two at a distance of less than a prime number are alike. */
const NOISE = Array.from({ length: 97 }, () => randomBytes(CLUSTER));

/** Clusters from `first` on, every `step`-th, as many as make up `bytes`. */
export function noise(first: number, bytes: number, step = 1): Map<number, Buffer> {
  const content = (index: number): Buffer => NOISE[(first * 31 + index) % NOISE.length]!;
  return new Map(
    Array.from({ length: bytes / CLUSTER }, (_, index) => [first + index * step, content(index)]),
  );
}

/** A point of a tree. */
export interface Write {
  readonly data: ReadonlyMap<number, Buffer>;
  /** Number of the point that it continues; default the one before it. */
  readonly parent?: number;
}

/** A repository with a tree of points, numbered from 0. */
export interface PointTree {
  readonly repository: Repository;
  readonly points: readonly PointManifest[];
  /** Path of a point's image below a directory; default the repository's own. */
  readonly path: (point: number, directory?: string) => string;
}

export async function pointTree(
  directory: string,
  virtualSize: number,
  writes: readonly Write[],
  machine = MACHINE,
): Promise<PointTree> {
  const repository = await initRepository(await LocalStorage.open(directory, { create: true }));
  const points = await addPoints(repository, virtualSize, writes, machine);
  const path = (point: number, root = directory): string =>
    `${root}/${machine}/${points[point]!.id}/vda.qcow2`;
  return { repository, points, path };
}

/** Makes the points of a tree in a repository. */
export async function addPoints(
  repository: Repository,
  virtualSize: number,
  writes: readonly Write[],
  machine = MACHINE,
): Promise<PointManifest[]> {
  const points: PointManifest[] = [];
  for (const [index, { data, parent = index - 1 }] of writes.entries()) {
    const disk = { name: "vda", token: "00c0ffee", virtualSize, data, parent: points[parent] };
    points.push(await writePoint(repository, { machine, id: pointId(index + 1), disks: [disk] }));
  }
  return points;
}

/** What each point holds, as raw files. */
export async function rawCopies({ points, path }: PointTree, directory: string): Promise<string[]> {
  const copies: string[] = [];
  for (const index of points.keys())
    copies.push(await toRaw(path(index), "qcow2", `${directory}/held-${index}.raw`));
  return copies;
}

/** By bare qemu-img: the image is clean, and its chain reads as the raw file. */
export async function expectSame(path: string, raw: string): Promise<void> {
  const { report, ...found } = await checkImage(path);
  expect(found, report).toEqual(CLEAN);
  expect(await compareImages({ path, format: "qcow2" }, { path: raw, format: "raw" })).toBe("identical");
}

/** Numbers of the points that are there, each of which must read as it was. */
export async function pointsThatAreRight(
  { points, path }: PointTree,
  directory: string,
  copies: readonly string[],
): Promise<number[]> {
  const folders = await readdir(`${directory}/${MACHINE}`);
  const there = [...points.keys()].filter((index) => folders.includes(points[index]!.id));
  for (const index of there) await expectSame(path(index, directory), copies[index]!);
  return there;
}
