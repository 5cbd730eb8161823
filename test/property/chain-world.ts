import { expect } from "vitest";
import { CLUSTER_DATA, ClusterHasher, HASH_BYTES, newHashKey } from "../../src/hashes/index.js";
import {
  imageFileOf,
  initRepository,
  openRepository,
  PointHashes,
  type PointChain,
  type PointManifest,
  type Repository,
} from "../../src/repository/index.js";
import { DamageError, TidemarkError } from "../../src/errors/index.js";
import { compactPoints, deletePoint, editPoint, flattenPoint, prunePoints } from "../../src/rewrite/index.js";
import type { Storage } from "../../src/storage/index.js";
import type { RangeReader, SegmentChecker } from "../../src/transfer/index.js";
import { verifyMachine, type VerifyReport } from "../../src/verify/index.js";
import { pointId, writeImages, type DiskContent } from "../interop/repository-points.js";
import { Crash, CrashingStorage } from "../support/crashing-storage.js";
import { PinnedMemory } from "../support/pinned-memory.js";
import { SuspendingStorage } from "../support/suspending-storage.js";
import { randomOf, TakingTurns, Turns } from "../support/turns.js";
import {
  below,
  changed,
  CLUSTER,
  flattened,
  needing,
  nextDisk,
  standing,
  without,
  withoutIdle,
  type Model,
  type ModelDisk,
  type ModelPoint,
} from "./chain-model.js";
import { firstDifference, QemuOracle } from "./chain-oracle.js";
import { Onlookers, type Counts } from "./chain-onlookers.js";
import type { BackupStep, Command, CommandStep, Step, Trouble } from "./chain-story.js";

const machine = "web";
const LOCK = `${machine}/lock`;
const fence = (): Promise<void> => Promise.resolve();

/** What a command is, by the model. */
interface Planned {
  /** Gives it to a repository. @returns ids of the points that it says it removed */
  readonly run: (repository: Repository, dryRun?: boolean) => Promise<readonly string[]>;
  /** What it makes of the model; undefined: it must refuse. */
  readonly after: Model | undefined;
}

/** Threads that all worlds share: starting them takes longer than what they have to do. */
export interface Threads {
  readonly checker: SegmentChecker;
  readonly ranges: RangeReader;
}

/** A repository in memory, and what every point in it must read as. */
export class ChainWorld {
  readonly storage = new PinnedMemory();
  readonly counts: Counts;
  readonly #oracle: QemuOracle;
  readonly #checker: SegmentChecker;
  readonly #ranges: RangeReader;
  readonly #keys = new Map<string, Buffer>();
  readonly #hashed = new Set<string>();
  #model: Model = new Map();
  #number = 0;

  private constructor(directory: string, { checker, ranges }: Threads, counts: Counts) {
    this.#oracle = new QemuOracle(this.storage, directory);
    this.#checker = checker;
    this.#ranges = ranges;
    this.counts = counts;
  }

  static async create(directory: string, threads: Threads, counts: Counts): Promise<ChainWorld> {
    const world = new ChainWorld(directory, threads, counts);
    await initRepository(world.storage);
    return world;
  }

  async apply(step: Step): Promise<void> {
    if (step.kind === "backup") await this.#backup(step);
    else await this.#command(step);
    await this.expectAll();
  }

  /** Every point that must be there is, continues what it must, and reads as it must; its hashes are those of what it holds. */
  async expectAll(): Promise<void> {
    const repository = await openRepository(this.storage);
    const { points, unreadable } = await repository.survey(machine);
    expect(unreadable).toEqual([]);
    expect(points.map(shapeOf)).toEqual(
      [...this.#model.values()].sort((a, b) => (a.id < b.id ? -1 : 1)).map(shapeOfModel),
    );
    for (const point of points) await this.#expectPoint(repository, point);
  }

  /** What others find: QEMU's programs, and `verify`. */
  async expectOthersAgree(): Promise<void> {
    const repository = await openRepository(this.storage);
    const points = await repository.points(machine);
    const images = points.flatMap(({ id, disks }) =>
      disks.map(({ token, image }) => ({
        key: `${machine}/${id}/${image}`,
        content: this.#model.get(id)!.disks.get(token)!.content,
      })),
    );
    await this.#oracle.expect(images);
    expect(await this.#verify()).toEqual({ points: points.length, problems: [] });
  }

  /** Turns one bit of an image around: `verify` says which points that costs, if any, and nobody reads anything else than was stored. */
  async expectAccused(place: number): Promise<void> {
    const repository = await openRepository(this.storage);
    const images = (await repository.points(machine)).flatMap(({ id, disks }) =>
      disks.map((disk) => ({ id, disk })),
    );
    const victim = images[Math.floor(place * images.length)];
    if (victim === undefined) return;
    const { id, disk } = victim;
    const key = `${machine}/${id}/${disk.image}`;
    const whole = await this.storage.bytes(key);
    const damaged = Buffer.from(whole);
    const at = Math.floor(((place * 7919) % 1) * whole.length);
    damaged[at]! ^= 1 << Math.floor(((place * 104_729) % 1) * 8);
    await this.storage.put(key, damaged);
    const { problems } = await this.#verify();
    expect(problems, `byte ${at} of ${key}`).not.toEqual([]);
    for (const problem of problems) expect(problem).toMatchObject({ point: id, disk: disk.name });
    const needed = needing(this.#model, id, disk.token);
    const affects = new Set(problems.flatMap((problem) => problem.affects));
    for (const point of affects) expect(needed).toContain(point);
    for (const point of needed) {
      const { name, content } = this.#model.get(point)!.disks.get(disk.token)!;
      const found = await readDisk(repository, point, name).catch((error: unknown) => error);
      if (found instanceof DamageError) expect(affects, `byte ${at} of ${key}`).toContain(point);
      else expectBytes(found as Buffer, content, `${point} ${name}`);
    }
    await this.storage.put(key, whole);
    this.counts.accusations += 1;
  }

  async #verify(): Promise<VerifyReport> {
    const repository = await openRepository(this.storage);
    return await verifyMachine({ repository, machine, checker: this.#checker, workers: 1 });
  }

  async #expectPoint(repository: Repository, { id, disks }: PointManifest): Promise<void> {
    for (const { name, token } of disks) {
      const { content } = this.#model.get(id)!.disks.get(token)!;
      const chain = await repository.openChain(machine, id, name);
      try {
        expect(chain.chain.virtualSize).toBe(content.length);
        expectBytes(await chain.chain.read(0, content.length), content, `${id} ${name}`);
        await this.#expectHashes(repository, chain, content);
      } finally {
        await chain.close();
      }
    }
  }

  /** The files of hashes tell what the disk holds. Those that were looked at are not looked at again. */
  async #expectHashes(repository: Repository, chain: PointChain, content: Buffer): Promise<void> {
    const files = chain.images.map(({ point, disk }) => {
      const key = `${machine}/${point.id}/${disk.hashes?.file ?? ""}`;
      return `${key} ${this.storage.versions.get(key) ?? ""}`;
    });
    if (this.#hashed.has(files.join())) return;
    const hashes = await repository.openHashes(chain);
    if (!(hashes instanceof PointHashes)) throw new Error(hashes);
    await expectHashes(hashes, content);
    await hashes.close();
    this.#hashed.add(files.join());
  }

  async #backup(step: BackupStep): Promise<void> {
    const id = pointId((this.#number += 1));
    const number = this.#number;
    const points = standing(this.#model);
    const parent = points.at(-1 - (step.parent % Math.max(points.length, 1)));
    const name = step.name === null ? null : `name-${step.name}`;
    const isTaken = points.some((point) => point.name === name);
    const made = new Map<string, ModelDisk>();
    const contents: { readonly disk: Omit<DiskContent, "parent">; readonly parentId: string | null }[] = [];
    for (const [index, disk] of step.disks.entries()) {
      const token = String(index).repeat(8);
      // A point has one disk at least.
      if (disk.isAbsent && (index < step.disks.length - 1 || made.size > 0)) continue;
      const base = disk.isFull ? undefined : this.#baseOf(parent, token);
      const before = base?.disks.get(token);
      const { content, data, zero } = nextDisk(disk, before?.content, number);
      const diskName = disk.isRenamed ? `vd${index}-${number}` : (before?.name ?? `disk${index}`);
      made.set(token, { name: diskName, parent: base?.id ?? null, content });
      const virtualSize = content.length;
      contents.push({
        disk: { name: diskName, token, virtualSize, clusterSize: CLUSTER, data, zero },
        parentId: base?.id ?? null,
      });
    }
    const write = async (storage: Storage): Promise<void> => {
      const repository = await openRepository(storage);
      const parents = new Map<string, PointManifest>();
      for (const { parentId } of contents)
        if (parentId !== null) parents.set(parentId, (await repository.point(machine, parentId))!);
      const disks = contents.map(({ disk, parentId }): DiskContent => ({
        ...disk,
        parent: parentId === null ? undefined : parents.get(parentId),
      }));
      const manifest = await writeImages(repository, {
        machine,
        id,
        name: isTaken ? null : name,
        parent: parent?.id ?? null,
        disks,
      });
      const hashed = [];
      for (const [index, disk] of manifest.disks.entries())
        hashed.push({ ...disk, hashes: await this.#writeHashes(repository, id, disks[index]!) });
      await repository.commitPoint({ ...manifest, disks: hashed }, { fence });
    };
    const point: ModelPoint = {
      id,
      parent: parent?.id ?? null,
      name: isTaken ? null : name,
      description: null,
      isTombstone: false,
      disks: made,
    };
    const dying = new CrashingStorage(this.storage, step.crash ?? -1);
    const outcome = await write(dying).catch((error: unknown) => error);
    if (dying.hasCrashed) this.counts.crashes += 1;
    else expect(outcome).toBeUndefined();
    const repository = await openRepository(this.storage);
    if ((await repository.point(machine, id)) !== undefined)
      this.#model = new Map(this.#model).set(id, point);
  }

  /** The nearest point from `point` on down that holds a disk: it may have been left out since. */
  #baseOf(point: ModelPoint | undefined, token: string): ModelPoint | undefined {
    let at = point;
    while (at !== undefined && !at.disks.has(token))
      at = at.parent === null ? undefined : this.#model.get(at.parent);
    return at;
  }

  async #writeHashes(
    repository: Repository,
    point: string,
    content: DiskContent,
  ): Promise<NonNullable<PointManifest["disks"][number]["hashes"]>> {
    const { name: disk, token, virtualSize, data, zero = [], parent } = content;
    const key = parent === undefined ? newHashKey() : this.#keys.get(`${parent.id} ${token}`)!;
    this.#keys.set(`${point} ${token}`, key);
    const image = { machine, point, disk, token, virtualSize, clusterSize: CLUSTER };
    const writer = await repository.createHashes(image, key);
    const hasher = new ClusterHasher(key);
    for (const [cluster, bytes] of data) writer.add([cluster], hasher.hash(bytes));
    for (const cluster of zero) writer.zero(cluster, 1);
    return { file: imageFileOf(disk).replace(/qcow2$/, "hashes"), ...(await writer.finish()) };
  }

  async #command({ command, trouble }: CommandStep): Promise<void> {
    const planned = this.#plan(command);
    if (planned === undefined) return;
    const { run, after } = planned;
    const { changes } = this.storage;
    if (after === undefined) {
      const refusal = await run(await openRepository(this.storage)).catch((error: unknown) => error);
      expect(refusal).toMatchObject({ code: "TM_USAGE" });
      this.counts.refusals += 1;
      return;
    }
    switch (trouble.kind) {
      case "none":
        break;
      case "dry run first":
        await run(await openRepository(this.storage), true);
        if (command.kind !== "edit") expect(this.storage.changes).toBe(changes);
        break;
      case "crash":
        if (await this.#crash(planned, trouble)) return;
        break;
      case "readers": {
        const turns = new Turns(randomOf(trouble.seed));
        const storage = new TakingTurns(this.storage, turns);
        const onlookers = new Onlookers(
          this.#ranges,
          await openRepository(storage),
          turns,
          this.#model,
          after,
          trouble.seed,
          this.counts,
        );
        await onlookers.during(run(await openRepository(storage)));
        await this.#arrive(command, after);
        return;
      }
      case "suspended":
        await this.#suspend(planned, trouble);
        return;
    }
    await run(await openRepository(this.storage));
    await this.#arrive(command, after);
  }

  /** Runs a command that dies on the way. @returns whether nothing is left to be done: it was not given again */
  async #crash(
    { run, after }: Planned,
    { at, isRepeated }: Extract<Trouble, { kind: "crash" }>,
  ): Promise<boolean> {
    const rehearsal = new CrashingStorage(await this.storage.clone(), -1);
    await run(await openRepository(rehearsal));
    const dying = new CrashingStorage(this.storage, Math.floor(at * 2 * rehearsal.calls));
    const outcome = await run(await openRepository(dying)).catch((error: unknown) => error);
    expect(dying.hasCrashed).toBe(true);
    // What dies while it gives the lock back has done its work.
    if (!Array.isArray(outcome)) expect(outcome).toBeInstanceOf(Crash);
    this.counts.crashes += 1;
    await this.#dropLock();
    await this.#lookAround(after!);
    await this.expectAll();
    await this.expectOthersAgree();
    if (isRepeated && [...this.#model.keys()].some((id) => !after!.has(id))) return false;
    await (await openRepository(this.storage)).finishRewrites(machine, { fence });
    await this.#lookAround(after!);
    return true;
  }

  async #suspend(
    { run, after }: Planned,
    { at, other }: Extract<Trouble, { kind: "suspended" }>,
  ): Promise<void> {
    const rehearsal = new SuspendingStorage(await this.storage.clone(), LOCK, -1);
    await run(await openRepository(rehearsal));
    const storage = new SuspendingStorage(this.storage, LOCK, Math.floor(at * rehearsal.moments));
    const before = this.#model;
    const ended = run(await openRepository(storage)).catch((error: unknown) => error);
    await storage.reached;
    await this.#dropLock();
    await this.#lookAround(after!);
    const second = this.#plan(other);
    const removed = await second?.run(await openRepository(this.storage)).catch((error: unknown) => {
      // What it works on may just have been removed, or may not be removed.
      if (second.after !== undefined) throw error;
      return [];
    });
    storage.wake();
    const outcome = await ended;
    if (!Array.isArray(outcome)) {
      expect(outcome).toBeInstanceOf(TidemarkError);
      this.counts.fenced += 1;
    }
    await this.#dropLock();
    await (await openRepository(this.storage)).finishRewrites(machine, { fence });
    // Nothing went that neither of them was to remove.
    const gone = new Set(removed);
    const kept = [...before.keys()].filter((id) => after!.has(id) && !gone.has(id));
    this.#model = before;
    await this.#lookAround(new Map(kept.map((id) => [id, after!.get(id)!])));
  }

  async #dropLock(): Promise<void> {
    for (const key of [...this.storage.versions.keys()])
      if (key === LOCK || key.startsWith(`${LOCK}.`)) await this.storage.delete(key);
  }

  /**
   * A command has ended: the points that can be named are those that it was to leave. Which forgotten ones stay for their
   * images, and who continues them, is its own matter where there are any, or when it may forget instead of removing.
   */
  async #arrive(command: Command, after: Model): Promise<void> {
    const mayForget = command.kind === "prune" || standing(this.#model).length < this.#model.size;
    if (!mayForget) {
      this.#model = after;
      return;
    }
    await this.#lookAround(after);
    expect(standing(this.#model).map(({ id, name }) => [id, name])).toEqual(
      standing(after).map(({ id, name }) => [id, name]),
    );
  }

  /** Takes over from the repository which points are there, and what continues what: what was interrupted may have come far or not. */
  async #lookAround(after: Model): Promise<void> {
    const { points } = await (await openRepository(this.storage)).survey(machine);
    const ids = points.map(({ id }) => id);
    for (const { id } of standing(after)) if (this.#model.has(id)) expect(ids).toContain(id);
    const found = points.map((point): [string, ModelPoint] => {
      const { id, parent, name, description, tombstone = false } = point;
      const before = this.#model.get(id);
      if (before === undefined) throw new Error(`Point ${id} came from nowhere`);
      const disks = [...before.disks].map(([token, disk]): [string, ModelDisk] => {
        const parentNow = point.disks.find((candidate) => candidate.token === token)!.parent;
        return [token, { ...disk, parent: parentNow }];
      });
      return [id, { id, parent, name, description, isTombstone: tombstone, disks: new Map(disks) }];
    });
    this.#model = new Map(found);
  }

  /** What a command is to do; undefined when there is nothing that it could be given. */
  #plan(command: Command): Planned | undefined {
    const model = this.#model;
    const points = standing(model);
    const at = (seed: number): ModelPoint => points[seed % points.length]!;
    if (points.length === 0) return undefined;
    const current = points.at(-1)!.id;
    switch (command.kind) {
      case "delete": {
        const { id: point } = at(command.point);
        const { scope, isForced: force } = command;
        const gone =
          scope === "children" || scope === "children-only" ? below(model, point) : new Set<string>();
        if (scope !== "children-only") gone.add(point);
        const isRefused = !force && gone.has(current);
        const rest =
          scope === "metadata-only"
            ? changed(model, point, { isTombstone: true })
            : withoutIdle(model, without(model, gone));
        return {
          run: async (repository, dryRun = false) => {
            const { removed } = await deletePoint({ repository, machine, point, scope, force, dryRun });
            return scope === "metadata-only" ? [] : removed;
          },
          after: isRefused ? undefined : rest,
        };
      }
      case "flatten": {
        const { id: point } = at(command.point);
        return {
          run: async (repository, dryRun = false) =>
            (await flattenPoint({ repository, machine, point, dryRun })).removed,
          after: withoutIdle(model, flattened(model, point)),
        };
      }
      case "prune": {
        const { last, pattern } = command;
        const policy = { last, names: pattern === null ? [] : [pattern] };
        const matches = (name: string | null): boolean =>
          name !== null && pattern !== null && (pattern === "name-*" || name === pattern);
        const kept = new Set(
          points
            .filter(({ name }, index) => index >= points.length - last || matches(name))
            .map(({ id }) => id),
        );
        const gone = new Set([...model.keys()].filter((id) => !kept.has(id)));
        return {
          run: async (repository, dryRun = false) =>
            (await prunePoints({ repository, machine, policy, now: new Date(), timeZone: "UTC", dryRun }))
              .removed,
          after: without(model, gone),
        };
      }
      case "compact": {
        const { share } = command;
        const point = command.point === null ? undefined : at(command.point).id;
        return {
          run: async (repository, dryRun = false) =>
            (await compactPoints({ repository, machine, point, share, dryRun })).removed,
          after: model,
        };
      }
      case "edit": {
        const { id: point, name: had } = at(command.point);
        const name = command.name === null ? undefined : `name-${command.name}`;
        const { description } = command;
        const isTaken = points.some(
          (other) => other.id !== point && name !== undefined && other.name === name,
        );
        const edit = { name: name ?? had, description: description === "" ? null : description };
        return {
          run: async (repository) => {
            await editPoint({ repository, machine, point, name, description });
            return [];
          },
          after: isTaken ? undefined : changed(model, point, edit),
        };
      }
    }
  }
}

/** All of a disk at a point, as our reader reads it. @throws what it throws */
export async function readDisk(repository: Repository, point: string, disk: string): Promise<Buffer> {
  const chain = await repository.openChain(machine, point, disk);
  try {
    return await chain.chain.read(0, chain.chain.virtualSize);
  } catch (error) {
    throw await chain.explain(error);
  } finally {
    await chain.close();
  }
}

export function expectBytes(found: Buffer, expected: Buffer, what: string): void {
  if (!found.equals(expected))
    throw new Error(`${what} reads differently, ${firstDifference(found, expected)}`);
}

/** A point without its bytes. */
function shapeOf({ id, parent, name, description, tombstone = false, disks }: PointManifest): unknown {
  const images = disks.map((disk) => [disk.token, disk.name, disk.parent, disk.virtualSize]);
  return { id, parent, name, description, tombstone, images };
}

function shapeOfModel({ id, parent, name, description, isTombstone: tombstone, disks }: ModelPoint): unknown {
  const images = [...disks].map(([token, disk]) => [token, disk.name, disk.parent, disk.content.length]);
  return { id, parent, name, description, tombstone, images };
}

async function expectHashes(hashes: PointHashes, content: Buffer): Promise<void> {
  const count = Math.ceil(content.length / CLUSTER);
  const window = await hashes.window(0, count);
  const hasher = new ClusterHasher(hashes.key);
  for (let cluster = 0; cluster < count; cluster += 1) {
    const part = content.subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER);
    const bytes = part.length === CLUSTER ? part : Buffer.concat([part], CLUSTER);
    const state = window.states[cluster];
    if (state === CLUSTER_DATA) {
      const hash = window.hashes.subarray(cluster * HASH_BYTES, (cluster + 1) * HASH_BYTES);
      if (!hasher.hash(bytes).equals(hash)) throw new Error(`the hash of cluster ${cluster} is another's`);
    } else if (state === 0 && !bytes.equals(ZEROES))
      throw new Error(`cluster ${cluster} has no hash, but holds data`);
  }
}

const ZEROES = Buffer.alloc(CLUSTER);
