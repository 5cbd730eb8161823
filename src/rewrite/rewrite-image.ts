import type { IoOptions } from "../bytes/index.js";
import { step } from "../flow/index.js";
import { measureMerge, mergeImages, type ImageSummary, type ImageWriter } from "../qcow2/index.js";
import {
  hashesFileOf,
  PointHashes,
  type DiskManifest,
  type NewImage,
  type PendingImage,
  type PointChain,
  type PointManifest,
  type Repository,
} from "../repository/index.js";
import { StorageError } from "../storage/index.js";
import { MergedHashes } from "./merged-hashes.js";
import type { ImageMerge } from "./plan.js";

/** Part of a new image that may be garbage; with more it is written without any. */
const MOST_GARBAGE = 1 / 3;

/** What writing images anew needs. */
export interface RewriteContext extends IoOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  /** Throws when the machine's lock is this run's no more. */
  readonly fence: () => Promise<void>;
  /** zstd level for the few clusters that no image has as they must be. */
  readonly level: number;
}

/** What was moved for one image. */
export interface RewrittenImage {
  readonly id: string;
  readonly disk: string;
  /** Bytes of frames that were copied one by one. */
  readonly copiedBytes: number;
  /** Bytes of the new image, without those of the one that it began as a copy of. */
  readonly writtenBytes: number;
}

/**
 * Merges an image with some of those below it, and puts the result in its place. From the moment at which the manifest
 * says what the new image will be, either of the two is right: they read alike as long as the images below are there.
 *
 * @param reason why the image is full now, if it is
 * @throws {DamageError} when a table or a frame that is needed is damaged; nothing is changed then
 */
export async function rewriteImage(
  merge: ImageMerge,
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage> {
  const { repository, machine, signal } = context;
  const chain = await repository.openChain(machine, merge.point, merge.disk, { signal });
  try {
    requireStack(chain, merge);
    return await replaceImage(chain, merge, reason, context);
  } catch (error) {
    throw await chain.explain(error);
  } finally {
    await chain.close();
  }
}

/** What writing an image anew would move; nothing is changed. */
export async function estimateRewrite(merge: ImageMerge, context: RewriteContext): Promise<RewrittenImage> {
  const { repository, machine, signal } = context;
  const chain = await repository.openChain(machine, merge.point, merge.disk, { signal });
  try {
    const live = await measureMerge(chain.chain, merge.stack.length, { signal });
    const copied = live.reduce((sum, bytes) => sum + bytes, 0) - (live[chooseBase(chain, live) ?? -1] ?? 0);
    return { id: merge.point, disk: merge.disk, copiedBytes: copied, writtenBytes: copied };
  } catch (error) {
    throw await chain.explain(error);
  } finally {
    await chain.close();
  }
}

async function replaceImage(
  chain: PointChain,
  merge: ImageMerge,
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage> {
  const { repository, machine, fence, level, signal } = context;
  const count = merge.stack.length;
  const base = chooseBase(chain, await measureMerge(chain.chain, count, { signal }));
  const baseImage = base === undefined ? undefined : chain.images[base];
  const image = newImageOf(chain, merge, machine);
  const hashes = await beginHashes(image, chain, context);
  let writer: ImageWriter | undefined;
  try {
    writer = await repository.createImage(image, { base: baseImage, signal });
    const observer = hashes.merged;
    const moved = await mergeImages({ chain: chain.chain, count, base, writer, level, observer, signal });
    await fence();
    const hashesFile = await hashes.finish();
    const announce = async (summary: ImageSummary): Promise<void> => {
      const next = describe(chain.disk, summary, {
        merge,
        reason,
        base: baseImage?.disk,
        kept: moved.keptBytes,
      });
      const pending = { [merge.disk]: { ...next, hashes: hashesFile } };
      await repository.changePoint(
        machine,
        merge.point,
        (point) => ({ ...point, pending: { ...point.pending, ...pending } }),
        context,
      );
      await step("rewrite announced");
      await fence();
    };
    const { length } = await writer.finish({ beforeCommit: announce });
    await step("image rewritten");
    await repository.finishRewrite(machine, merge.point, context);
    await step("rewrite finished");
    const { copiedBytes } = moved;
    return {
      id: merge.point,
      disk: merge.disk,
      copiedBytes,
      writtenBytes: length - (baseImage?.disk.bytes ?? 0),
    };
  } catch (error) {
    await writer?.abort();
    await hashes.abort();
    // Whoever took the lock over may have removed what this run was writing: then that is what happened to it.
    if (error instanceof StorageError) await fence();
    throw error;
  } finally {
    await hashes.close();
  }
}

function newImageOf({ disk, images }: PointChain, { point, stack }: ImageMerge, machine: string): NewImage {
  const { name, token, virtualSize, clusterSize, image: file } = disk;
  const parent = images[stack.length];
  const below = parent === undefined ? undefined : { point: parent.point.id, image: parent.disk.image };
  return { machine, point, disk: name, file, token, virtualSize, clusterSize, parent: below };
}

/** Images that were merged or taken away since the plan was made would be merged wrongly. */
function requireStack(chain: PointChain, { stack, parent }: ImageMerge): void {
  const found = chain.images.slice(0, stack.length + 1).map(({ point }) => point.id);
  const expected = parent === null ? stack : [...stack, parent];
  if (found.join() !== expected.join()) {
    throw new RangeError(`chain of ${chain.disk.name} is ${found.join()}, not ${expected.join()}`);
  }
}

/**
 * The image whose bytes the new one begins with: the one that gives most. None, when too much of it would be garbage.
 *
 * @param live bytes that each would give
 * @returns its index
 */
function chooseBase(chain: PointChain, live: readonly number[]): number | undefined {
  const most = Math.max(...live);
  const base = live.indexOf(most);
  const held = (chain.images[base]?.disk.bytes ?? 0) - most;
  const all = live.reduce((sum, bytes) => sum + bytes, 0);
  return held > (all + held) * MOST_GARBAGE ? undefined : base;
}

interface BegunHashes {
  readonly merged: MergedHashes | undefined;
  finish(): Promise<PendingImage["hashes"]>;
  abort(): Promise<void>;
  close(): Promise<void>;
}

/** Begins the file of hashes of a new image, where those of its chain are at hand. */
async function beginHashes(
  image: NewImage,
  chain: PointChain,
  { repository, signal }: RewriteContext,
): Promise<BegunHashes> {
  const source = await repository.openHashes(chain, { signal });
  const nothing = (): Promise<void> => Promise.resolve();
  if (!(source instanceof PointHashes)) {
    return { merged: undefined, finish: () => Promise.resolve(null), abort: nothing, close: nothing };
  }
  const file = freeHashesFile(chain.point, chain.disk.name);
  const writer = await repository
    .createHashes(image, source.key, { file, signal })
    .catch(async (error: unknown) => {
      await source.close();
      throw error;
    });
  const merged = new MergedHashes(writer, source);
  return {
    merged,
    finish: async () => {
      const summary = await merged.finish();
      return summary === null ? null : { file, ...summary };
    },
    abort: () => merged.abort(),
    close: () => source.close(),
  };
}

/** A name that no file of hashes in the point's folder has: the old one's counts as long as the old image may be there. */
function freeHashesFile({ disks, pending = {} }: PointManifest, disk: string): string {
  const taken = new Set([...disks, ...Object.values(pending)].map(({ hashes }) => hashes?.file));
  let file = hashesFileOf(disk);
  for (let number = 2; taken.has(file); number += 1) file = hashesFileOf(`${disk.slice(0, 50)}-${number}`);
  return file;
}

function describe(
  disk: DiskManifest,
  summary: ImageSummary,
  facts: {
    readonly merge: ImageMerge;
    readonly reason: string;
    readonly base: DiskManifest | undefined;
    /** Bytes of the base's frames that are in use. */
    readonly kept: number;
  },
): PendingImage {
  const { merge, reason, base, kept } = facts;
  const { length, segments, sha256, dataClusters, zeroClusters } = summary;
  const isFull = merge.parent === null;
  return {
    kind: isFull ? "full" : "incremental",
    reason: isFull && disk.kind === "incremental" ? reason : disk.reason,
    parent: merge.parent,
    ...{ bytes: length, sha256, segments, dataClusters, zeroClusters },
    garbageBytes: base === undefined ? 0 : Math.max(0, base.bytes - base.clusterSize - kept),
  };
}
