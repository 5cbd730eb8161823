import PQueue from "p-queue";
import type { IoOptions } from "../bytes/index.js";
import { messageOf } from "../errors/index.js";
import { HashChain, HashDamageError, HashReader, type HashWindow } from "../hashes/index.js";
import { ObjectNotFoundError, type ObjectReader, type Storage } from "../storage/index.js";
import { hashesKey } from "./layout.js";
import type { DiskManifest, PointManifest } from "./manifest.js";
import type { PointChain } from "./point-chain.js";

/** Files of hashes that are opened at a time. */
const OPENING = 8;

/** Hashes of one image, opened. */
export interface OpenHashes {
  readonly reader: HashReader;
  readonly object: ObjectReader;
}

/**
 * Opens the hashes of a disk's image; undefined when its manifest names none.
 *
 * @throws {HashDamageError} when they are missing or are not what the manifest says
 */
export async function openHashes(
  storage: Storage,
  machine: string,
  point: string,
  disk: DiskManifest,
  options: IoOptions = {},
): Promise<OpenHashes | undefined> {
  const { hashes, virtualSize, clusterSize, dataClusters, zeroClusters } = disk;
  if (hashes == null) return undefined;
  const name = hashesKey(machine, point, hashes.file);
  const object = await storage.open(name, options).catch((error: unknown) => {
    throw error instanceof ObjectNotFoundError
      ? new HashDamageError(name, "it is missing", { cause: error })
      : error;
  });
  try {
    const facts = { name, ...hashes, virtualSize, clusterSize, dataClusters, zeroClusters };
    return { reader: await HashReader.open(object, facts, options), object };
  } catch (error) {
    await object.close();
    throw error;
  }
}

/** Reads all hashes of an image. @throws {HashDamageError} when they are missing or are not what was stored */
export async function checkHashes(
  storage: Storage,
  { id, machine }: PointManifest,
  disk: DiskManifest,
  options: IoOptions = {},
): Promise<void> {
  const hashes = await openHashes(storage, machine.name, id, disk, options);
  if (hashes === undefined) return;
  try {
    await hashes.reader.verify(options);
  } finally {
    await hashes.object.close();
  }
}

/** The key of the hashes of a chain's topmost image; undefined when there are none that can be trusted. */
export async function hashKeyOf(
  storage: Storage,
  { point, disk }: PointChain,
  options: IoOptions = {},
): Promise<Buffer | undefined> {
  try {
    const hashes = await openHashes(storage, point.machine.name, point.id, disk, options);
    await hashes?.object.close();
    return hashes?.reader.key;
  } catch (error) {
    if (error instanceof HashDamageError) return undefined;
    throw error;
  }
}

/** The hashes of all images of a disk's chain: what the disk held at a point, without reading what is stored. */
export class PointHashes {
  readonly key: Buffer;
  readonly #chain: HashChain;
  readonly #objects: readonly ObjectReader[];

  private constructor(chain: HashChain, objects: readonly ObjectReader[]) {
    this.key = chain.key;
    this.#chain = chain;
    this.#objects = objects;
  }

  /**
   * @param options.count only those of the topmost images
   * @returns the hashes, or why they are not there, for people: "point X has no hashes"
   */
  static async open(
    storage: Storage,
    chain: PointChain,
    { count, ...options }: IoOptions & { readonly count?: number } = {},
  ): Promise<PointHashes | string> {
    const images = chain.images.slice(0, count);
    const without = images.find(({ disk }) => disk.hashes == null);
    if (without !== undefined) return `point ${without.point.id} has no hashes`;
    const queue = new PQueue({ concurrency: OPENING });
    const opening = await Promise.allSettled(
      images.map(({ point, disk }) =>
        queue.add(() => openHashes(storage, point.machine.name, point.id, disk, options)),
      ),
    );
    const open = opening.flatMap((result) => (result.status === "fulfilled" ? (result.value ?? []) : []));
    const objects = open.map(({ object }) => object);
    const merged = HashChain.of(open.map(({ reader }) => reader));
    if (merged !== undefined && open.length === opening.length) return new PointHashes(merged, objects);
    await Promise.all(objects.map((object) => object.close()));
    const errors = opening.flatMap((result) =>
      result.status === "rejected" ? [result.reason as Error] : [],
    );
    // What could not be found out is no damage.
    const failure = errors.find((error) => !(error instanceof HashDamageError));
    if (failure !== undefined) throw failure;
    return errors.length === 0 ? "the hashes of its chain have different keys" : messageOf(errors[0]);
  }

  /** What the disk holds of clusters: see HashChain.window. */
  async window(
    first: number,
    count: number,
    options: IoOptions & { readonly onDamage?: (error: HashDamageError) => void } = {},
  ): Promise<HashWindow> {
    return await this.#chain.window(first, count, options);
  }

  /** What one image holds of clusters: see HashChain.imageWindow. */
  async imageWindow(
    image: number,
    first: number,
    count: number,
    options: IoOptions = {},
  ): Promise<HashWindow> {
    return await this.#chain.imageWindow(image, first, count, options);
  }

  /** Never throws. */
  async close(): Promise<void> {
    await Promise.all(this.#objects.map((object) => object.close()));
  }
}
