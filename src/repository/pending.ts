import { createHash } from "node:crypto";
import type { IoOptions } from "../bytes/index.js";
import { ObjectNotFoundError, type Storage } from "../storage/index.js";
import { imageKey } from "./layout.js";
import type { DiskManifest, PendingImage, PointManifest } from "./manifest.js";

/**
 * A manifest as it holds now: where an image is being written anew, the storage tells which of its two versions is
 * there. What is returned has nothing pending.
 */
export async function settle(
  storage: Storage,
  manifest: PointManifest,
  options: IoOptions = {},
): Promise<PointManifest> {
  const { pending, ...rest } = manifest;
  if (pending === undefined) return manifest;
  const disks: DiskManifest[] = [];
  for (const disk of manifest.disks) {
    const next = pending[disk.name];
    const key = imageKey(manifest.machine.name, manifest.id, disk.image);
    const isNew = next !== undefined && (await isThere(storage, key, next, options));
    disks.push(isNew ? { ...disk, ...next } : disk);
  }
  return { ...rest, disks };
}

/** Whether the image under a key is this one: by its length, and its header cluster, which is written last. */
async function isThere(
  storage: Storage,
  key: string,
  image: PendingImage,
  options: IoOptions,
): Promise<boolean> {
  const header = image.segments.at(-1);
  const object = await storage.open(key, options).catch((error: unknown) => {
    // Whoever opens the image will say that it is missing.
    if (error instanceof ObjectNotFoundError) return undefined;
    throw error;
  });
  if (object === undefined || header === undefined) return false;
  try {
    if (object.length !== image.bytes) return false;
    const bytes = await object.read(0, header.length, options);
    return createHash("sha256").update(bytes).digest("hex") === header.sha256;
  } finally {
    await object.close();
  }
}
