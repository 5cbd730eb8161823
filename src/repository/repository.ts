import { MiB, roundUp, type IoOptions } from "../bytes/index.js";
import { HASHES_HEADER_BYTES, HashWriter } from "../hashes/index.js";
import { ImageWriter } from "../qcow2/index.js";
import type { Storage } from "../storage/index.js";
import { listMachines, readManifest, surveyMachine, type Survey } from "./catalogue.js";
import { changePoint, finishRewrite, finishRewrites, removePoints, type ChangeOptions } from "./change.js";
import { commitPoint, type CommitOptions } from "./commit.js";
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
import type { DiskManifest, PointManifest } from "./manifest.js";
import { openComparison, type Comparison } from "./comparison.js";
import { openChain, openImage, type OpenChainOptions } from "./open-chain.js";
import { settle } from "./pending.js";
import type { PointChain } from "./point-chain.js";
import { checkHashes, hashKeyOf, PointHashes } from "./point-hashes.js";
import type { PointImage } from "./point-image.js";
import { createRepositoryFile, readRepositoryFile, type RepositoryFile } from "./repository-file.js";

/** What an image that is to be written belongs to. */
export interface NewImage {
  readonly machine: string;
  /** Id of the point. */
  readonly point: string;
  /** Name of the disk. */
  readonly disk: string;
  /** File name in the point's folder; default `imageFileOf(disk)`. */
  readonly file?: string | undefined;
  readonly token: string;
  /** Bytes of the disk. */
  readonly virtualSize: number;
  /** Bytes of a cluster. */
  readonly clusterSize: number;
  /** The image that it is an increment of: its point, and its file as that point's manifest has it. */
  readonly parent?: { readonly point: string; readonly image: string } | undefined;
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
   * As `points`, each as it holds now: a run that died, or is still at work, may have put images in their places that the
   * manifest calls pending.
   */
  async settledPoints(machine: string, options: IoOptions = {}): Promise<readonly PointManifest[]> {
    const settled: PointManifest[] = [];
    for (const point of await this.points(machine, options))
      settled.push(await settle(this.storage, point, options));
    return settled;
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
   * Begins an image. Where there is one already, it stays until the new one is finished, which then takes its place.
   *
   * @param options an abort of `signal` ends the writer, too
   * @param options.base an image whose bytes the new one begins with: see `ImageWriter.extend`
   * @param options.pace asked before bytes of that one are copied, where they are not shared
   * @throws {UsageError} for names and sizes that cannot be
   */
  async createImage(
    image: NewImage,
    options: IoOptions & {
      readonly base?: PointImage | undefined;
      readonly pace?: ((bytes: number) => Promise<void>) | undefined;
    } = {},
  ): Promise<ImageWriter> {
    const { machine, point, disk, token, virtualSize, clusterSize, parent } = image;
    const { base, pace, signal } = options;
    const key = imageKey(machine, point, image.file ?? imageFileOf(disk));
    const backing =
      parent === undefined
        ? undefined
        : ({ file: backingName(parent.point, parent.image), format: "qcow2" } as const);
    const copied = base === undefined ? undefined : { object: base.object, length: base.disk.bytes, pace };
    const sink = await this.storage.create(key, { headLength: clusterSize, base: copied, signal });
    const imageOptions = {
      ...{ virtualSize, clusterSize, backing },
      identity: { point, parent: parent?.point ?? null, machine, disk, token },
      segmentBytes: segmentBytesOf(virtualSize),
    };
    try {
      if (base === undefined) return ImageWriter.create(sink, imageOptions);
      const segments = base.disk.segments.filter(({ kind }) => kind !== "header");
      return ImageWriter.extend(sink, imageOptions, { segments, length: base.disk.bytes });
    } catch (error) {
      await sink.abort();
      throw error;
    }
  }

  /**
   * Begins the hashes of such an image.
   *
   * @param key of the chain: `hashKey` of the parent, or a new one
   * @param options.file default `hashesFileOf(disk)`
   */
  async createHashes(
    image: NewImage,
    key: Buffer,
    { file, signal }: IoOptions & { readonly file?: string } = {},
  ): Promise<HashWriter> {
    const { machine, point, disk, virtualSize, clusterSize } = image;
    const name = hashesKey(machine, point, file ?? hashesFileOf(disk));
    const sink = await this.storage.create(name, { headLength: HASHES_HEADER_BYTES, signal });
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
    return await openComparison(this.storage, { machine, point, disk }, options);
  }

  /**
   * The hashes of a chain, or why they are not all there: "point X has no hashes".
   *
   * @param options.count only those of the topmost images
   */
  async openHashes(
    chain: PointChain,
    options: IoOptions & { readonly count?: number } = {},
  ): Promise<PointHashes | string> {
    return await PointHashes.open(this.storage, chain, options);
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
    options: OpenChainOptions = {},
  ): Promise<PointChain> {
    return await openChain(this.storage, { machine, point, disk }, options);
  }

  /** Opens one image of a point alone: see `openImage`. */
  async openImage(
    machine: string,
    point: string,
    disk: string,
    options: IoOptions = {},
  ): Promise<PointImage> {
    return await openImage(this.storage, { machine, point, disk }, options);
  }

  /** Reads all hashes of an image. @throws {HashDamageError} when they are not what was stored */
  async checkHashes(point: PointManifest, disk: DiskManifest, options: IoOptions = {}): Promise<void> {
    await checkHashes(this.storage, point, disk, options);
  }

  /** Commits a point whose images are finished: see `commitPoint`. */
  async commitPoint(manifest: PointManifest, options: CommitOptions): Promise<void> {
    await commitPoint(this.storage, manifest, options);
  }

  /** Changes a committed point's manifest: see `changePoint`. */
  async changePoint(
    machine: string,
    id: string,
    change: (manifest: PointManifest) => PointManifest | Promise<PointManifest>,
    options: ChangeOptions,
  ): Promise<PointManifest> {
    return await changePoint(this.storage, machine, id, change, options);
  }

  /** Removes committed points that no other one needs: see `removePoints`. */
  async removePoints(
    machine: string,
    ids: readonly string[],
    options: ChangeOptions,
    onRemoved?: (id: string) => Promise<void> | undefined,
  ): Promise<void> {
    await removePoints(this.storage, machine, ids, options, onRemoved);
  }

  /** Completes what runs that died while they wrote images anew have left: see `finishRewrites`. */
  async finishRewrites(machine: string, options: ChangeOptions): Promise<void> {
    await finishRewrites(this.storage, machine, options);
  }

  /** Completes the rewriting of one point's images: see `finishRewrite`. */
  async finishRewrite(machine: string, id: string, options: ChangeOptions): Promise<PointManifest> {
    return await finishRewrite(this.storage, machine, id, options);
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
}

function segmentBytesOf(virtualSize: number): number {
  const wanted = roundUp(Math.ceil(virtualSize / SEGMENTS), MiB);
  return Math.min(Math.max(wanted, LEAST_SEGMENT), LARGEST_SEGMENT);
}
