import type { IoOptions } from "../bytes/index.js";
import { DamageError, messageOf } from "../errors/index.js";
import type { Budget } from "../flow/index.js";
import type { Segment } from "../qcow2/index.js";
import type { DiskManifest, PointImage, PointManifest, Repository } from "../repository/index.js";
import type { SegmentChecker } from "../transfer/index.js";
import { damagedClusters } from "./exposure.js";

/** What checking an image needs. */
export interface ImageCheck extends IoOptions {
  readonly repository: Repository;
  readonly point: PointManifest;
  readonly disk: DiskManifest;
  readonly checker: SegmentChecker;
  /** Bytes that are read and not yet checked. */
  readonly inFlight: Budget;
  /** Waits until so many bytes may be read. */
  readonly pass: (bytes: number) => Promise<void>;
  /** Which of an image's segments are to be read, by their indices. */
  readonly choose: (disk: DiskManifest) => ReadonlySet<number>;
  readonly onProgress: (bytes: number) => void;
}

/** Something that is wrong with an image. */
export interface Finding {
  /** For people. */
  readonly what: string;
  /**
   * What cannot be read because of it: the whole image, as far as one knows; some clusters, by their offsets in the disk; or nothing
   * that a restore needs.
   */
  readonly costs: "image" | "nothing" | readonly number[];
}

/**
 * Checks one image of a point against its manifest: link, length, header, every table, as many segments of frames as are
 * chosen, and the hashes beside it.
 */
export async function checkImage(check: ImageCheck): Promise<Finding[]> {
  const { repository, point, signal } = check;
  /** As the image is: it may be one that was being written anew when the manifest was read. */
  let { disk } = check;
  const found: Finding[] = [];
  const attempt = async (costs: Finding["costs"], work: () => Promise<void>): Promise<void> => {
    try {
      await work();
    } catch (error) {
      if (!(error instanceof DamageError)) throw error;
      found.push({ what: messageOf(error), costs });
    }
  };
  await attempt("image", async () => {
    const image = await repository.openImage(point.machine.name, point.id, disk.name, { signal });
    try {
      ({ disk } = image);
      const wrong = await checkSegments(image, check);
      const isSound = wrong.every(({ segment }) => segment.kind === "data");
      // Where tables are damaged, too, they do not tell what a frame is of.
      const told = isSound
        ? await damagedClusters(
            image,
            wrong.map(({ segment }) => segment),
            { signal },
          )
        : [];
      found.push(...wrong.map(({ what }, index) => ({ what, costs: told[index] ?? ("image" as const) })));
      if (!isSound) return;
      await attempt("image", async () => {
        const what = await miscounted(image, { signal });
        if (what !== undefined) found.push({ what, costs: "nothing" });
      });
    } finally {
      await image.close();
    }
  });
  await attempt("nothing", () => repository.checkHashes(point, disk, { signal }));
  return found;
}

/** A segment that is not what was stored. */
interface WrongSegment {
  readonly segment: Segment;
  readonly what: string;
}

/** Reads segments and has them checked, side by side. */
async function checkSegments(image: PointImage, check: ImageCheck): Promise<WrongSegment[]> {
  const { checker, inFlight, pass, choose, onProgress, signal } = check;
  const { format } = image.reader;
  const wrong: WrongSegment[] = [];
  const checking: Promise<void>[] = [];
  const checkOne = async (segment: Segment): Promise<void> => {
    const { offset, length, sha256, kind } = segment;
    try {
      const bytes = await image.object.read(offset, length, { signal });
      const what = await checker.check({
        bytes: bytes.buffer.byteLength === length ? bytes.buffer : new Uint8Array(bytes).buffer,
        ...{ at: offset, sha256, frames: kind === "data" ? format : undefined },
      } as Parameters<SegmentChecker["check"]>[0]);
      if (what !== undefined) wrong.push({ segment, what: `"${image.key}" is damaged: ${what}` });
      onProgress(length);
    } finally {
      inFlight.give(length);
    }
  };
  try {
    const chosen = choose(image.disk);
    for (const [index, segment] of image.disk.segments.entries()) {
      if (!chosen.has(index)) continue;
      await pass(segment.length);
      await inFlight.take(segment.length, { signal });
      const checked = checkOne(segment);
      // Its failure is thrown below, when all have ended.
      checked.catch(() => undefined);
      checking.push(checked);
    }
  } finally {
    await Promise.allSettled(checking);
  }
  await Promise.all(checking);
  return wrong.sort((a, b) => a.segment.offset - b.segment.offset);
}

/**
 * Walks all tables: every entry must make sense, and they must map as many clusters as the manifest says.
 *
 * @returns what is wrong with the counts, which no restore needs
 * @throws {DamageError} when an entry makes no sense
 */
async function miscounted(image: PointImage, { signal }: IoOptions): Promise<string | undefined> {
  const { disk } = image;
  const { clusterSize, virtualSize } = disk;
  let data = 0;
  let zero = 0;
  for await (const { kind, length } of image.reader.map(0, virtualSize, { signal })) {
    if (kind === "zero") zero += Math.ceil(length / clusterSize);
    else if (kind !== "unallocated") data += Math.ceil(length / clusterSize);
  }
  if (data === disk.dataClusters && zero === disk.zeroClusters) return undefined;
  return `"${image.key}" maps ${data} data and ${zero} zero clusters, its manifest says ${disk.dataClusters} and ${disk.zeroClusters}`;
}
