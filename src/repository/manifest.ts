import { z } from "zod";
import { KiB, MiB } from "../bytes/index.js";
import { isName, isPointId } from "../point/index.js";
import { isHashesFile, isImageFile, isMachineName } from "./layout.js";

/** The version of the manifest's format that this code writes, and the newest that it reads. */
export const MANIFEST_FORMAT = 1;

/** A longer manifest is not read: it would be some TiB of image, or hostile. */
export const MAX_MANIFEST_BYTES = 128 * MiB;

const MAX_DISKS = 1024;
const MAX_SEGMENTS = 1_000_000;

/** How a machine was at its freeze. */
export const MACHINE_STATES = ["running", "paused", "shut off"] as const;
/** What a point promises its restored guest: as after a power cut, as after a sync, as it was shut down. */
export const CONSISTENCIES = ["crash", "filesystem", "offline"] as const;

const count = z.int().nonnegative();
const sha256 = z.string().regex(/^[0-9a-f]{64}$/, "is no SHA-256 in lower-case hex");
const pointId = z.string().refine(isPointId, "is no point id");
const name = z.string().refine(isName, "is no allowed name");
/** Shown on terminals: no control characters, whoever wrote the manifest. */
const text = (length: number): z.ZodString =>
  z
    .string()
    .max(length)
    .regex(/^[^\p{Cc}\u2028\u2029]*$/u, "holds control characters");

const segment = z
  .looseObject({
    offset: count,
    length: z.int().positive(),
    sha256,
    kind: z.enum(["data", "table", "header"]),
  })
  .readonly();

/** What a manifest says about an image, all of which changes when the image is written anew. */
const imageFields = {
  kind: z.enum(["full", "incremental"]),
  /** Why the image is full, or why an incremental one was compared; null where a bitmap said what changed. */
  reason: text(4096).nullable(),
  /** The point that this disk's image is an increment of; null for a full one. */
  parent: pointId.nullable(),
  /** Length of the image in bytes. */
  bytes: count,
  /** SHA-256 of the segments' digests, one after the other. */
  sha256,
  /** In the order of writing: consecutive from the end of the header cluster, the header cluster last. */
  segments: z.array(segment).max(MAX_SEGMENTS).readonly(),
  /** Hashes of the clusters that the image stores; null, or absent, where there are none. */
  hashes: z
    .looseObject({
      /** File name in the point's folder. */
      file: z.string().refine(isHashesFile, "is no allowed file name of hashes"),
      bytes: count,
      /** SHA-256 of its header. */
      sha256,
    })
    .readonly()
    .nullable()
    .optional(),
  dataClusters: count,
  zeroClusters: count,
  /** Bytes of the image that nothing refers to any more. */
  garbageBytes: count,
};

const disk = z
  .looseObject({
    name,
    token: z.string().regex(/^[0-9a-f]{8}$/, "is no disk token"),
    /** Path of the device in QEMU when the point was made: evidence, not identity. */
    qdev: text(4096).nullable(),
    virtualSize: count.multipleOf(512),
    clusterSize: z
      .int()
      .min(512)
      .max(2048 * KiB)
      .refine((size) => Number.isInteger(Math.log2(size)), "is no power of two"),
    /** File name of the image in the point's folder. */
    image: z.string().refine(isImageFile, "is no allowed file name of an image"),
    ...imageFields,
    /** Bytes that the bitmap showed as written since the parent; null where no bitmap was read. */
    dirtyBytes: count.nullable(),
    /** Name of the checkpoint's bitmap in QEMU; null where none was made. */
    bitmap: z.string().max(1023).nullable(),
  })
  .readonly();

/** The schema of `point.json`. Fields that it does not know are kept. */
export const pointManifest = z
  .looseObject({
    format: z.literal(MANIFEST_FORMAT),
    id: pointId,
    machine: z
      .looseObject({
        name: z.string().refine(isMachineName, "is no allowed name"),
        uuid: z.guid().nullable(),
      })
      .readonly(),
    /** Given by the user, both free. */
    name: text(256).nullable(),
    description: text(4096).nullable(),
    /** Time of the freeze. */
    created: z.iso.datetime(),
    state: z.enum(MACHINE_STATES),
    consistency: z.enum(CONSISTENCIES),
    parent: pointId.nullable(),
    versions: z.looseObject({ tidemark: text(256), qemu: text(256).nullable() }).readonly(),
    /** What was found out about the machine, for whoever rebuilds it; free. */
    configuration: z.record(z.string(), z.unknown()).readonly(),
    disks: z.array(disk).min(1).max(MAX_DISKS).readonly(),
    /** How many checkpoints were to stay in the machine with this one, its own included; absent: 1. */
    keepCheckpoints: z.int().positive().optional(),
    /** The point was forgotten: it can no longer be named, and stays only for the images of others that need its own. */
    tombstone: z.boolean().optional(),
    /**
     * Images that are being written anew, by the names of their disks: what is said here holds once the new image has
     * taken the place of the old one, which may have happened already or not. They read alike.
     */
    pending: z.record(name, z.looseObject(imageFields).readonly()).readonly().optional(),
  })
  .readonly();

/** The fields that this version knows: what a type says should not hide a misspelt name. */
type Known<T> = T extends readonly (infer Item)[]
  ? readonly Known<Item>[]
  : T extends object
    ? [NamedKeys<T>] extends [never]
      ? { readonly [Key in keyof T]: Known<T[Key]> }
      : { readonly [Key in keyof T as string extends Key ? never : Key]: Known<T[Key]> }
    : T;
type NamedKeys<T> = keyof { [Key in keyof T as string extends Key ? never : Key]: true };

/** A restore point, as `point.json` describes it. */
export type PointManifest = Known<z.output<typeof pointManifest>>;
/** One disk of a restore point. */
export type DiskManifest = PointManifest["disks"][number];
/** Bytes of the images and hashes of points. */
export function storedBytesOf(points: readonly PointManifest[]): number {
  const disks = points.flatMap((point) => point.disks);
  return disks.reduce((sum, { bytes, hashes }) => sum + bytes + (hashes?.bytes ?? 0), 0);
}

/** An image of a restore point that is being written anew, as it will be. */
export type PendingImage = NonNullable<PointManifest["pending"]>[string];
export type MachineState = (typeof MACHINE_STATES)[number];
export type Consistency = (typeof CONSISTENCIES)[number];
