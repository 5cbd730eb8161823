import { MiB, roundUp, type IoOptions } from "../bytes/index.js";
import { DamageError, NotFoundError } from "../errors/index.js";
import { HASHES_HEADER_BYTES, HashWriter } from "../hashes/index.js";
import { ImageWriter } from "../qcow2/index.js";
import type { Storage } from "../storage/index.js";
import { listMachines, readManifest, surveyMachine, type Survey } from "./catalogue.js";
import { commitPoint, findOnce, type CommitOptions } from "./commit.js";
import { collectGarbage, discardPoint, type Collection } from "./garbage.js";
import {
  backingName,
  hashesFileOf,
  hashesKey,
  imageFileOf,
  imageKey,
  lockKey,
  requireMachineName,
} from "./layout.js";
import type { LockTimes } from "./lock-contest.js";
import { MachineLock } from "./lock.js";
import type { PointManifest } from "./manifest.js";
import { PointChain, resolveChain } from "./point-chain.js";
import { hashKeyOf, PointHashes } from "./point-hashes.js";
import { createRepositoryFile, readRepositoryFile, type RepositoryFile } from "./repository-file.js";
import { dependentsOf } from "./tree.js";

/** What an image that is to be written belongs to. */
export interface NewImage {
  readonly machine: string;
  /** Id of the point. */
  readonly point: string;
  /** Name of the disk. */
  readonly disk: string;
  readonly token: string;
  /** Bytes of the disk. */
  readonly virtualSize: number;
  /** Bytes of a cluster. */
  readonly clusterSize: number;
  /** The image that it is an increment of: its point, and its file as that point's manifest has it. */
  readonly parent?: { readonly point: string; readonly image: string } | undefined;
}

/** A disk at a point, opened to be compared with. */
export interface Comparison {
  readonly chain: PointChain;
  readonly hashes: PointHashes;
}

/** Segments of an image as it may become, about: a bucket takes an object in 10,000 parts at most. */
const SEGMENTS = 9000;
const LEAST_SEGMENT = 8 * MiB;
/** Tables wait in memory until they make up a segment. */
const LARGEST_SEGMENT = 64 * MiB;

/**
 * Makes a repository in an empty storage.
 *
 * @throws {UsageError} when a repository is there already, or other things are; nothing is changed
 */
export async function initRepository(
  storage: Storage,
  options: IoOptions & { readonly now?: Date } = {},
): Promise<Repository> {
  const { now = new Date(), ...io } = options;
  return new Repository(storage, await createRepositoryFile(storage, now, io));
}

/**
 * Opens a repository.
 *
 * @throws {NotFoundError} TM_REPOSITORY_NOT_FOUND when there is none
 * @throws {NewerFormatError} when a newer tidemark made it
 */
export async function openRepository(storage: Storage, options: IoOptions = {}): Promise<Repository> {
  return new Repository(storage, await readRepositoryFile(storage, options));
}

/** Where points live. Made by `initRepository` and `openRepository`. */
export class Repository {
  /** A UUID. */
  readonly id: string;
  readonly storage: Storage;
  readonly file: RepositoryFile;

  constructor(storage: Storage, file: RepositoryFile) {
    this.id = file.id;
    this.storage = storage;
    this.file = file;
  }

  /** Names of all machines, sorted. */
  async machines(options: IoOptions = {}): Promise<string[]> {
    return await listMachines(this.storage, options);
  }

  /** All that is in a machine's folder: its points, those that cannot be read, those that were not committed. */
  async survey(machine: string, options: IoOptions = {}): Promise<Survey> {
    return await surveyMachine(this.storage, machine, options);
  }

  /**
   * The points of a machine, oldest first; none for a machine that is not there.
   *
   * @throws {ManifestDamageError | NewerFormatError} when any of them cannot be read; `survey` tells them apart
   */
  async points(machine: string, options: IoOptions = {}): Promise<readonly PointManifest[]> {
    const { points, unreadable } = await this.survey(machine, options);
    const [first] = unreadable;
    if (first !== undefined) throw first.error;
    return points;
  }

  /**
   * A point; undefined only when it is definitely not there.
   *
   * @throws {ManifestDamageError | NewerFormatError} when it is there but cannot be read
   */
  async point(machine: string, id: string, options: IoOptions = {}): Promise<PointManifest | undefined> {
    return await readManifest(this.storage, machine, id, options);
  }

  /**
   * Begins an image of a point that is not committed yet. Its file is `imageFileOf(disk)`.
   *
   * @param options an abort of `signal` ends the writer, too
   * @throws {UsageError} for names and sizes that cannot be
   */
  async createImage(image: NewImage, options: IoOptions = {}): Promise<ImageWriter> {
    const { machine, point, disk, token, virtualSize, clusterSize, parent } = image;
    const key = imageKey(machine, point, imageFileOf(disk));
    const backing =
      parent === undefined
        ? undefined
        : ({ file: backingName(parent.point, parent.image), format: "qcow2" } as const);
    const sink = await this.storage.create(key, { headLength: clusterSize, ...options });
    try {
      return ImageWriter.create(sink, {
        virtualSize,
        clusterSize,
        backing,
        identity: { point, parent: parent?.point ?? null, machine, disk, token },
        segmentBytes: segmentBytesOf(virtualSize),
      });
    } catch (error) {
      await sink.abort();
      throw error;
    }
  }

  /**
   * Begins the hashes of such an image. Their file is `hashesFileOf(disk)`.
   *
   * @param key of the chain: `hashKey` of the parent, or a new one
   */
  async createHashes(image: NewImage, key: Buffer, options: IoOptions = {}): Promise<HashWriter> {
    const { machine, point, disk, virtualSize, clusterSize } = image;
    const file = hashesKey(machine, point, hashesFileOf(disk));
    const sink = await this.storage.create(file, { headLength: HASHES_HEADER_BYTES, ...options });
    return HashWriter.create(sink, { virtualSize, clusterSize, key });
  }

  /** The key of the hashes of a chain's topmost image; undefined when there are none that can be trusted. */
  async hashKey(chain: PointChain, options: IoOptions = {}): Promise<Buffer | undefined> {
    return await hashKeyOf(this.storage, chain, options);
  }

  /**
   * Opens a disk at a point to compare another content with it: its chain, and the hashes of all of its images.
   *
   * @returns both, or why they cannot be had, for people: "point X has no hashes"
   * @throws {NotFoundError} when there is no such point, or it has no such disk
   */
  async openComparison(
    machine: string,
    point: string,
    disk: string,
    options: IoOptions = {},
  ): Promise<Comparison | string> {
    let chain: PointChain;
    try {
      chain = await this.openChain(machine, point, disk, options);
    } catch (error) {
      if (error instanceof DamageError) return `parent damaged: ${error.message}`;
      throw error;
    }
    let hashes: PointHashes | string | undefined;
    try {
      hashes = await PointHashes.open(this.storage, chain, options);
      return typeof hashes === "string" ? hashes : { chain, hashes };
    } finally {
      if (!(hashes instanceof PointHashes)) await chain.close();
    }
  }

  /**
   * Opens a disk at a point: every image of its chain, checked against the manifests.
   *
   * @throws {NotFoundError} when there is no such point, or it has no such disk
   * @throws {DamageError} when a manifest or an image is missing or is not what it must be; names the
   *   object and the points that need it
   */
  async openChain(
    machine: string,
    point: string,
    disk: string,
    options: IoOptions = {},
  ): Promise<PointChain> {
    const find = findOnce(this.storage, machine, options);
    const top = await find(point);
    if (top === undefined)
      throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find point ${point} of machine "${machine}"`);
    const found = top.disks.find((candidate) => candidate.name === disk);
    if (found === undefined) {
      const names = top.disks.map((candidate) => `"${candidate.name}"`).join(", ");
      throw new NotFoundError(
        "TM_DISK_NOT_FOUND",
        `Cannot find disk "${disk}" in point ${point} of machine "${machine}"`,
        {
          hint: `It holds ${names}`,
        },
      );
    }
    const chain = await resolveChain(top, found, find);
    const known = chain.map((facts) => facts.point.id).reverse();
    const affected = (id: string, token: string): Promise<readonly string[]> =>
      this.#affected(machine, id, token, known);
    return await PointChain.open(this.storage, chain, affected, options);
  }

  /** Commits a point whose images are finished: see `commitPoint`. */
  async commitPoint(manifest: PointManifest, options: CommitOptions): Promise<void> {
    await commitPoint(this.storage, manifest, options);
  }

  /** Removes the files of a point that was not committed. @throws {TidemarkError} TM_POINT_COMMITTED when it was */
  async discardPoint(machine: string, id: string, options: IoOptions = {}): Promise<void> {
    await discardPoint(this.storage, machine, id, options);
  }

  /** Removes what dead runs left of points that they never committed: see `collectGarbage`. */
  async collectGarbage(machine: string, lock: MachineLock, options: IoOptions = {}): Promise<Collection> {
    return await collectGarbage(this.storage, machine, lock, options);
  }

  /** Locks a machine for changes to its points. @throws {LockedError} when another run holds it */
  async lockMachine(
    machine: string,
    options: IoOptions & { readonly times?: LockTimes } = {},
  ): Promise<MachineLock> {
    return await MachineLock.acquire(this.storage, lockKey(requireMachineName(machine)), options);
  }

  /** The points that need an image; at least those `known` to, where manifests cannot be read. */
  async #affected(
    machine: string,
    id: string,
    token: string,
    known: readonly string[],
  ): Promise<readonly string[]> {
    const above = known.slice(Math.max(known.indexOf(id), 0));
    try {
      const { points } = await this.survey(machine);
      const ids = dependentsOf(points, id, token).map((point) => point.id);
      return [...new Set([...above, ...ids])].sort();
    } catch {
      // The damage is the news: that the list of its victims cannot be completed must not hide it.
      return above;
    }
  }
}

function segmentBytesOf(virtualSize: number): number {
  const wanted = roundUp(Math.ceil(virtualSize / SEGMENTS), MiB);
  return Math.min(Math.max(wanted, LEAST_SEGMENT), LARGEST_SEGMENT);
}
