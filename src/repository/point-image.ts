import type { IoOptions } from "../bytes/index.js";
import { DamageError, messageOf } from "../errors/index.js";
import { ImageReader, UnsupportedImageError } from "../qcow2/index.js";
import { ObjectNotFoundError, type ObjectReader, type Storage } from "../storage/index.js";
import { PointImageDamageError } from "./errors.js";
import { backingName, imageKey } from "./layout.js";
import type { DiskManifest, PointManifest } from "./manifest.js";
import { VerifyingSource } from "./verifying-source.js";

/** One image of a chain, with the manifests that say what it must be. */
export interface ImageFacts {
  readonly point: PointManifest;
  readonly disk: DiskManifest;
  /** The image below, as the parent's manifest has it; undefined for a full image. */
  readonly parent: { readonly point: string; readonly image: string } | undefined;
}

export interface PointImageOptions extends IoOptions {
  /** Bytes of tables that its reader keeps in memory. */
  readonly cacheBytes?: number;
  /** Ids of the points that need the image: asked only when it is damaged. */
  readonly affected: () => Promise<readonly string[]>;
}

/** An image of a point, opened: everything that its header says agrees with its manifest. */
export class PointImage {
  /** Key of the image in the storage, by which messages and damages name it. */
  readonly key: string;
  readonly point: PointManifest;
  readonly disk: DiskManifest;
  readonly reader: ImageReader;
  /** The image's file, opened. */
  readonly object: ObjectReader;

  private constructor(key: string, facts: ImageFacts, reader: ImageReader, object: ObjectReader) {
    this.key = key;
    this.point = facts.point;
    this.disk = facts.disk;
    this.reader = reader;
    this.object = object;
  }

  /** @throws {PointImageDamageError} when the image is missing or is not what the manifest says */
  static async open(storage: Storage, facts: ImageFacts, options: PointImageOptions): Promise<PointImage> {
    const { point, disk } = facts;
    const { signal } = options;
    const key = imageKey(point.machine.name, point.id, disk.image);
    const report = async (what: string, cause?: unknown): Promise<PointImageDamageError> =>
      new PointImageDamageError(key, await options.affected(), what, { cause });
    const object = await storage.open(key, { signal }).catch(async (error: unknown) => {
      throw error instanceof ObjectNotFoundError ? await report("it is missing", error) : error;
    });
    try {
      if (object.length !== disk.bytes)
        throw await report(`it has ${object.length} bytes, its manifest says ${disk.bytes}`);
      const source = new VerifyingSource(object, disk.segments, report);
      const { cacheBytes } = options;
      const reader = await ImageReader.open(source, { signal, name: key, cacheBytes, tables: source.tables });
      const mismatch = mismatchOf(reader, facts);
      if (mismatch !== undefined) throw await report(mismatch);
      return new PointImage(key, facts, reader, object);
    } catch (error) {
      await object.close();
      if (error instanceof PointImageDamageError) throw error;
      // Header and L1 table are verified by now: what an image reader cannot read then was never right.
      const isWrong = error instanceof DamageError || error instanceof UnsupportedImageError;
      throw isWrong ? await report(messageOf(error), error) : error;
    }
  }

  /** Never throws. */
  async close(): Promise<void> {
    await this.object.close();
  }
}

/** What an image says about itself that its manifest does not. */
function mismatchOf(reader: ImageReader, { point, disk, parent }: ImageFacts): string | undefined {
  const backing = parent === undefined ? undefined : backingName(parent.point, parent.image);
  const expected = {
    "virtual size": disk.virtualSize,
    "cluster size": disk.clusterSize,
    compression: "zstd",
    "backing file": backing,
    "backing format": backing === undefined ? undefined : "qcow2",
    point: point.id,
    parent: disk.parent,
    machine: point.machine.name,
    disk: disk.name,
    token: disk.token,
  };
  const found = {
    "virtual size": reader.virtualSize,
    "cluster size": reader.clusterSize,
    compression: reader.compression,
    "backing file": reader.backingFile,
    "backing format": reader.backingFormat,
    point: reader.identity?.point,
    parent: reader.identity?.parent,
    machine: reader.identity?.machine,
    disk: reader.identity?.disk,
    token: reader.identity?.token,
  };
  const field = (Object.keys(expected) as (keyof typeof expected)[]).find(
    (name) => expected[name] !== found[name],
  );
  if (field === undefined) return undefined;
  const say = (value: unknown): string => (value === undefined ? "none" : JSON.stringify(value));
  return `its header says ${field} ${say(found[field])}, ${say(expected[field])} is expected`;
}
