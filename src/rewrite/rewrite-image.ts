import { step } from "../flow/index.js";
import { mergeImages, type ImageSummary, type ImageWriter } from "../qcow2/index.js";
import {
  hashesFileOf,
  PointHashes,
  type DiskManifest,
  type NewImage,
  type PendingImage,
  type PointChain,
  type PointImage,
  type PointManifest,
} from "../repository/index.js";
import { StorageError } from "../storage/index.js";
import type { MeasuredMerge } from "./measure.js";
import { MergedHashes } from "./merged-hashes.js";
import type { ImageMerge } from "./plan.js";
import { openStack, type RewriteContext, type RewrittenImage } from "./stack.js";

/**
 * Merges an image with some of those below it, and puts the result in its place. From the moment at which the manifest
 * says what the new image will be, either of the two is right: they read alike as long as the images below are there.
 *
 * @param reason why the image is full now, if it is
 * @throws {DamageError} when a table or a frame that is needed is damaged; nothing is changed then
 */
export async function rewriteImage(
  measured: MeasuredMerge,
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage> {
  const { copiedBytes, baseBytes } = measured.expected;
  context.movement?.beginImage(copiedBytes + baseBytes);
  const rewritten = await openStack(measured.merge, context, (chain) =>
    replaceImage(chain, measured, reason, context),
  );
  context.movement?.endImage();
  return rewritten;
}

async function replaceImage(
  chain: PointChain,
  { merge, base }: MeasuredMerge,
  reason: string,
  context: RewriteContext,
): Promise<RewrittenImage> {
  const { repository, machine, fence, level, movement, signal } = context;
  const baseImage = base === undefined ? undefined : chain.images[base];
  const image = newImageOf(chain, merge, machine);
  const hashes = await beginHashes(image, chain, merge.stack.length, context);
  const pace = movement === undefined ? undefined : (bytes: number) => movement.pass(bytes);
  let writer: ImageWriter | undefined;
  try {
    writer = await beginImage(image, baseImage, context);
    const moved = await mergeImages({
      ...{ chain: chain.chain, count: merge.stack.length, base, writer, level, pace, signal },
      read: (offset, length) => readWhole(merge, offset, length, context),
      observer: hashes.merged,
    });
    await fence();
    const hashesFile = await hashes.finish();
    const announce = async (summary: ImageSummary): Promise<void> => {
      const facts = { merge, reason, base: baseImage?.disk, kept: moved.keptBytes };
      const next = describe(chain.disk, summary, facts);
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
    const baseBytes = baseImage?.disk.bytes ?? 0;
    const { copiedBytes } = moved;
    return { id: merge.point, disk: merge.disk, copiedBytes, writtenBytes: length - baseBytes, baseBytes };
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

async function beginImage(
  image: NewImage,
  base: PointImage | undefined,
  { repository, movement, signal }: RewriteContext,
): Promise<ImageWriter> {
  let copied = 0;
  const pace = async (bytes: number): Promise<void> => {
    await movement?.pass(bytes);
    copied += bytes;
  };
  const writer = await repository.createImage(image, { base, pace, signal });
  if (base !== undefined) movement?.spare(base.disk.bytes - copied);
  return writer;
}

/** Reads of the disk as the whole chain has it: for the few clusters that have to be made anew. */
async function readWhole(
  { point, disk }: ImageMerge,
  offset: number,
  length: number,
  { repository, machine, signal }: RewriteContext,
): Promise<Buffer> {
  const whole = await repository.openChain(machine, point, disk, { signal });
  try {
    return await whole.chain.read(offset, length, { signal });
  } catch (error) {
    throw await whole.explain(error);
  } finally {
    await whole.close();
  }
}

function newImageOf({ disk, images }: PointChain, { point, stack }: ImageMerge, machine: string): NewImage {
  const { name, token, virtualSize, clusterSize, image: file } = disk;
  const parent = images[stack.length];
  const below = parent === undefined ? undefined : { point: parent.point.id, image: parent.disk.image };
  return { machine, point, disk: name, file, token, virtualSize, clusterSize, parent: below };
}

interface BegunHashes {
  readonly merged: MergedHashes | undefined;
  finish(): Promise<PendingImage["hashes"]>;
  abort(): Promise<void>;
  close(): Promise<void>;
}

/** Begins the file of hashes of a new image, where those of the `count` images that are merged are at hand. */
async function beginHashes(
  image: NewImage,
  chain: PointChain,
  count: number,
  { repository, signal }: RewriteContext,
): Promise<BegunHashes> {
  const source = await repository.openHashes(chain, { count, signal });
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
