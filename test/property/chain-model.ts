/** What the points of a repository must hold: bytes, and who continues whom. Written without a look at the code that is tested. */
import { createCipheriv } from "node:crypto";
import type { Change, DiskStep } from "./chain-story.js";

export const CLUSTER = 4096;
const SECTOR = 512;
const FIRST_SECTORS = 100;
const ZEROES = Buffer.alloc(CLUSTER);

export interface ModelDisk {
  readonly name: string;
  readonly parent: string | null;
  readonly content: Buffer;
}

export interface ModelPoint {
  readonly id: string;
  readonly parent: string | null;
  readonly name: string | null;
  readonly description: string | null;
  readonly isTombstone: boolean;
  /** By token. */
  readonly disks: ReadonlyMap<string, ModelDisk>;
}

/** By id. A model is never changed: commands make another one. */
export type Model = ReadonlyMap<string, ModelPoint>;

export function standing(model: Model): ModelPoint[] {
  return [...model.values()].filter(({ isTombstone }) => !isTombstone).sort((a, b) => (a.id < b.id ? -1 : 1));
}

/** Without some points, whose data moves into those that need it. */
export function without(model: Model, removed: ReadonlySet<string>): Model {
  const kept = (id: string | null, parentOf: (point: ModelPoint) => string | null): string | null => {
    let at = id;
    while (at !== null && removed.has(at)) at = parentOf(model.get(at)!);
    return at;
  };
  const left = [...model.values()].filter(({ id }) => !removed.has(id));
  return new Map(
    left.map((point) => {
      const disks = [...point.disks].map(([token, disk]): [string, ModelDisk] => [
        token,
        { ...disk, parent: kept(disk.parent, ({ disks }) => disks.get(token)!.parent) },
      ]);
      const parent = kept(point.parent, (removedPoint) => removedPoint.parent);
      return [point.id, { ...point, parent, disks: new Map(disks) }];
    }),
  );
}

/** Without the forgotten points that somebody's images needed, and nobody's need any more. */
export function withoutIdle(before: Model, after: Model): Model {
  const isNeeded = (model: Model, id: string): boolean =>
    [...model.values()].some(({ disks }) => [...disks.values()].some(({ parent }) => parent === id));
  const idle = [...after.values()].find(
    ({ id, isTombstone }) => isTombstone && isNeeded(before, id) && !isNeeded(after, id),
  );
  return idle === undefined ? after : withoutIdle(before, without(after, new Set([idle.id])));
}

/** With a change to one point. */
export function changed(model: Model, id: string, change: Partial<ModelPoint>): Model {
  return new Map(model).set(id, { ...model.get(id)!, ...change });
}

export function flattened(model: Model, id: string): Model {
  const disks = [...model.get(id)!.disks].map(([token, disk]) => [token, { ...disk, parent: null }] as const);
  return changed(model, id, { disks: new Map(disks) });
}

/** The points that were made after `id`, or need it. */
export function below(model: Model, id: string): Set<string> {
  const found = new Set<string>();
  const visit = (parent: string): void => {
    for (const point of model.values()) {
      const parents = [point.parent, ...[...point.disks.values()].map((disk) => disk.parent)];
      if (!parents.includes(parent) || found.has(point.id)) continue;
      found.add(point.id);
      visit(point.id);
    }
  };
  visit(id);
  return found;
}

/** The points whose chain of a disk goes through the image that `id` holds of it, `id` among them. */
export function needing(model: Model, id: string, token: string): string[] {
  const needs = (at: string | null): boolean =>
    at !== null && (at === id || needs(model.get(at)!.disks.get(token)?.parent ?? null));
  return [...model.values()]
    .filter((point) => point.disks.has(token) && needs(point.id))
    .map((point) => point.id)
    .sort();
}

/** What a disk holds after a step, and what an image stores of it. */
export interface NextDisk {
  readonly content: Buffer;
  readonly data: ReadonlyMap<number, Buffer>;
  readonly zero: readonly number[];
}

/**
 * @param before what the disk held at the point that the image continues; undefined: the image is full
 * @param number of the point: bytes that are written tell it
 */
export function nextDisk(step: DiskStep, before: Buffer | undefined, number: number): NextDisk {
  const old = before ?? Buffer.alloc(0);
  const size = step.size === null ? (before?.length ?? FIRST_SECTORS * SECTOR) : step.size * SECTOR;
  const content = Buffer.alloc(size);
  old.copy(content);
  const touched = new Set<number>();
  const touch = (from: number, to: number): void => {
    for (let cluster = Math.floor(from / CLUSTER); cluster * CLUSTER < to; cluster += 1) touched.add(cluster);
  };
  if (before !== undefined && step.isGrowthDirty) touch(old.length, size);
  if (before === undefined && step.isBorderWritten) apply(BORDER, content, number, touch);
  for (const change of step.changes) apply(change, content, number, touch);
  const clusters = Math.ceil(size / CLUSTER);
  for (const place of step.surplus) touched.add(Math.floor(place * clusters));
  const data = new Map<number, Buffer>();
  const zero: number[] = [];
  for (let cluster = 0; cluster < clusters; cluster += 1) {
    const at = cluster * CLUSTER;
    const part = Buffer.alloc(CLUSTER);
    content.subarray(at, at + CLUSTER).copy(part);
    const had = Buffer.alloc(CLUSTER);
    // What lay beyond the disk's new end is no difference: its image says by its length that it is gone.
    old.subarray(at, Math.min(at + CLUSTER, size)).copy(had);
    if (!touched.has(cluster) && part.equals(had)) {
      if (before !== undefined) continue;
    }
    const isZero = part.equals(ZEROES);
    if (!isZero) data.set(cluster, part);
    else if (touched.has(cluster) || !part.equals(had)) zero.push(cluster);
  }
  return { content, data, zero };
}

function apply(
  { kind, place, at, sectors, seed }: Change,
  content: Buffer,
  number: number,
  touch: (from: number, to: number) => void,
): void {
  const all = content.length / SECTOR;
  if (all === 0) return;
  const anywhere = Math.floor(place * all);
  const clusterSectors = CLUSTER / SECTOR;
  const first =
    at === "cluster"
      ? anywhere - (anywhere % clusterSectors)
      : at === "end"
        ? Math.max(0, all - sectors)
        : anywhere;
  const end = Math.min(all, first + sectors);
  if (kind === "cut") {
    content.fill(0, first * SECTOR);
    return;
  }
  touch(first * SECTOR, end * SECTOR);
  for (let sector = first; sector < end; sector += 1) {
    const bytes = content.subarray(sector * SECTOR, (sector + 1) * SECTOR);
    if (kind === "zero" || kind === "discard") {
      bytes.fill(0);
      continue;
    }
    if (kind === "write") bytes.fill(0x5a);
    else NOISE.copy(bytes, 0, ((number * 31 + seed * 7 + sector) % NOISE_SECTORS) * SECTOR);
    bytes.writeUInt32LE(number, 0);
    bytes.writeUInt32LE(seed, 4);
    bytes.writeUInt32LE(sector, 8);
  }
}

const BORDER: Change = { kind: "noise", place: 0, at: "anywhere", sectors: 112, seed: 0 };
const NOISE_SECTORS = 2048;
/** Bytes that do not compress, so that images have some length and are worth to be continued. */
const NOISE = createCipheriv("aes-256-ctr", Buffer.alloc(32, 1), Buffer.alloc(16)).update(
  Buffer.alloc(NOISE_SECTORS * SECTOR),
);
