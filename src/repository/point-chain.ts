import PQueue from "p-queue";
import { MiB, type IoOptions } from "../bytes/index.js";
import { DamageError, messageOf } from "../errors/index.js";
import { ImageChain } from "../qcow2/index.js";
import type { Storage } from "../storage/index.js";
import { ChainDamageError, PointImageDamageError } from "./errors.js";
import { manifestKey } from "./layout.js";
import type { DiskManifest, PointManifest } from "./manifest.js";
import { PointImage, type ImageFacts } from "./point-image.js";

/** Images that are opened at a time. */
const OPENING = 8;
/** Bytes of tables kept in memory by all readers of a chain together; by each of them one table at least. */
const TABLE_CACHE = 64 * MiB;

/** How a chain is opened. */
export interface ChainOptions extends IoOptions {
  /** It is read once, in the order of the disk: every image needs the table in use alone. */
  readonly inOrder?: boolean | undefined;
}

/** Reads the manifest of a point of one machine; undefined when it is definitely not there. */
export type FindPoint = (id: string) => Promise<PointManifest | undefined>;

/** Ids of the points that need the image which point `id` holds of a disk. */
export type FindAffected = (id: string, token: string) => Promise<readonly string[]>;

/**
 * The images that make up a disk at a point: that point's first, the full one last.
 *
 * @param depth how many of them at most, from the top
 * @throws {ChainDamageError} when a manifest is missing, or does not continue the chain
 */
export async function resolveChain(
  point: PointManifest,
  disk: DiskManifest,
  find: FindPoint,
  depth = Infinity,
): Promise<ImageFacts[]> {
  const chain: ImageFacts[] = [];
  for (let next: Step | undefined = { point, disk }; next !== undefined && chain.length < depth;) {
    const above: readonly string[] = chain.map((facts) => facts.point.id);
    const below: Step | undefined = await stepDown(next, find, above);
    chain.push(factsOf(next, below));
    next = below;
  }
  return chain;
}

/** The topmost image of that chain alone. */
export async function resolveTop(
  point: PointManifest,
  disk: DiskManifest,
  find: FindPoint,
): Promise<ImageFacts> {
  const top = { point, disk };
  return factsOf(top, await stepDown(top, find, []));
}

interface Step {
  readonly point: PointManifest;
  readonly disk: DiskManifest;
}

function factsOf(step: Step, below: Step | undefined): ImageFacts {
  return {
    ...step,
    parent: below === undefined ? undefined : { point: below.point.id, image: below.disk.image },
  };
}

/**
 * From an image to the one that it is an increment of; undefined below a full one. Manifests decide, by the
 * disk's token: names may have changed from point to point.
 *
 * @param above ids of the points further up, for the error
 */
async function stepDown(step: Step, find: FindPoint, above: readonly string[]): Promise<Step | undefined> {
  const { point, disk } = step;
  const id = disk.parent;
  if (id === null) return undefined;
  const broken = (what: string): ChainDamageError =>
    new ChainDamageError(manifestKey(point.machine.name, id), [...above, point.id].sort(), what);
  const below = await find(id);
  if (below === undefined)
    throw broken(`disk "${disk.name}" of point ${point.id} is an increment of it, but it is missing`);
  const lower = below.disks.find((candidate) => candidate.token === disk.token);
  if (lower === undefined)
    throw broken(`it holds no disk ${disk.token}, of which point ${point.id} has an increment`);
  if (lower.clusterSize !== disk.clusterSize)
    throw broken(
      `its clusters have ${lower.clusterSize} bytes, those of point ${point.id} ${disk.clusterSize}`,
    );
  return { point: below, disk: lower };
}

/** A disk at a point, readable: all images of its chain, opened and checked against their manifests. */
export class PointChain {
  readonly point: PointManifest;
  readonly disk: DiskManifest;
  /** Top first; all of the chain, unless it was opened with a depth. */
  readonly images: readonly PointImage[];
  /** Those images read as one disk. What it throws goes through `explain`. */
  readonly chain: ImageChain;
  readonly #affected: FindAffected;

  private constructor(top: PointImage, images: readonly PointImage[], affected: FindAffected) {
    this.point = top.point;
    this.disk = top.disk;
    this.images = images;
    this.chain = ImageChain.of(images.map((image) => image.reader));
    this.#affected = affected;
  }

  /** @throws {PointImageDamageError} when an image is missing or is not what its manifest says */
  static async open(
    storage: Storage,
    facts: readonly ImageFacts[],
    affected: FindAffected,
    options: ChainOptions = {},
  ): Promise<PointChain> {
    const queue = new PQueue({ concurrency: OPENING });
    const cacheBytes = options.inOrder === true ? 0 : Math.floor(TABLE_CACHE / facts.length);
    const opening = await Promise.allSettled(
      facts.map((image) =>
        queue.add(() =>
          PointImage.open(storage, image, {
            signal: options.signal,
            cacheBytes,
            affected: () => affected(image.point.id, image.disk.token),
          }),
        ),
      ),
    );
    const images = opening.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
    const [top] = images;
    if (top !== undefined && images.length === facts.length) return new PointChain(top, images, affected);
    await Promise.all(images.map((image) => image.close()));
    throw opening.find((result) => result.status === "rejected")?.reason;
  }

  /**
   * Adds to an error of reading the chain what only the repository knows: a damage of one of its images names
   * the image's key and all points that need it. Any other error is returned as it is.
   *
   * @example
   * try { await copy(chain.chain, target); } catch (error) { throw await chain.explain(error); }
   */
  async explain(error: unknown): Promise<unknown> {
    if (!(error instanceof DamageError) || error instanceof PointImageDamageError) return error;
    const image = this.images.find((candidate) => candidate.key === error.damage.object);
    if (image === undefined) return error;
    const points = await this.#affected(image.point.id, image.disk.token);
    return new PointImageDamageError(image.key, points, messageOf(error), { cause: error });
  }

  /** Closes all images. Never throws. */
  async close(): Promise<void> {
    await Promise.all(this.images.map((image) => image.close()));
  }
}
