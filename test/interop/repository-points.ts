/** Points for tests of the repository: made of clusters that the test gives, written through the repository itself. */
import { createHash } from "node:crypto";
import { KiB } from "../../src/bytes/index.js";
import { formatBitmapName, repositoryTag } from "../../src/point/index.js";
import { FrameEncoder, frameBound, type ImageSummary } from "../../src/qcow2/index.js";
import {
  imageFileOf,
  type DiskManifest,
  type PointManifest,
  type Repository,
} from "../../src/repository/index.js";

/** A point id made for reading: minute and number. */
export function pointId(number: number): string {
  const text = String(number).padStart(4, "0");
  return `20261120T06${text.slice(0, 2)}${text.slice(2)}000Z-${text.padStart(6, "0")}`;
}

/** What a disk of a new point holds. */
export interface DiskContent {
  readonly name: string;
  readonly token: string;
  readonly virtualSize: number;
  readonly clusterSize?: number;
  /** Bytes of clusters, by number; short ones are padded with zeroes. */
  readonly data: ReadonlyMap<number, Buffer>;
  /** Clusters that are explicitly zero. */
  readonly zero?: readonly number[];
  /** The point whose image of this disk the new one continues. */
  readonly parent?: PointManifest | undefined;
}

export interface NewPoint {
  readonly machine: string;
  readonly id: string;
  readonly name?: string | null;
  readonly parent?: string | null;
  readonly disks: readonly DiskContent[];
}

/** Writes the images of a point. @returns its manifest, not committed */
export async function writeImages(repository: Repository, point: NewPoint): Promise<PointManifest> {
  const disks: DiskManifest[] = [];
  for (const disk of point.disks) {
    const summary = await writeImage(repository, point, disk);
    disks.push(diskManifest(repository.id, point.id, disk, summary));
  }
  return pointManifest(point, disks);
}

/** Writes and commits a point. */
export async function writePoint(repository: Repository, point: NewPoint): Promise<PointManifest> {
  const manifest = await writeImages(repository, point);
  await repository.commitPoint(manifest, { fence: () => Promise.resolve() });
  return manifest;
}

async function writeImage(repository: Repository, point: NewPoint, disk: DiskContent): Promise<ImageSummary> {
  const { name, token, virtualSize, clusterSize = 64 * KiB, parent } = disk;
  const below = parent?.disks.find((candidate) => candidate.token === token);
  const writer = await repository.createImage({
    ...{ machine: point.machine, point: point.id, disk: name, token, virtualSize, clusterSize },
    parent:
      parent === undefined || below === undefined ? undefined : { point: parent.id, image: below.image },
  });
  const encoder = new FrameEncoder(3);
  for (const [cluster, bytes] of disk.data) {
    const whole = Buffer.alloc(clusterSize);
    bytes.copy(whole);
    const frame = Buffer.alloc(frameBound(clusterSize));
    const length = encoder.encode(whole, frame, 0);
    await writer.append({ payload: frame.subarray(0, length), frames: [{ cluster, length }] });
  }
  for (const cluster of disk.zero ?? []) writer.zero(cluster, 1);
  return await writer.finish();
}

function diskManifest(
  repositoryId: string,
  point: string,
  disk: DiskContent,
  summary: ImageSummary,
): DiskManifest {
  const { name, token, virtualSize, clusterSize = 64 * KiB, parent } = disk;
  return {
    ...{ name, token, qdev: `/machine/peripheral/${name}/virtio-backend`, virtualSize, clusterSize },
    kind: parent === undefined ? "full" : "incremental",
    reason: parent === undefined ? "first backup of this disk" : null,
    parent: parent?.id ?? null,
    image: imageFileOf(name),
    bytes: summary.length,
    sha256: summary.sha256,
    segments: summary.segments,
    dataClusters: summary.dataClusters,
    zeroClusters: summary.zeroClusters,
    dirtyBytes: null,
    garbageBytes: 0,
    bitmap: formatBitmapName({ repository: repositoryTag(repositoryId), checkpoint: point, token }),
  };
}

function pointManifest(point: NewPoint, disks: readonly DiskManifest[]): PointManifest {
  return {
    format: 1,
    id: point.id,
    machine: { name: point.machine, uuid: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0" },
    name: point.name ?? null,
    description: null,
    created: "2026-11-20T06:50:09.123Z",
    state: "running",
    consistency: "crash",
    parent: point.parent ?? point.disks[0]?.parent?.id ?? null,
    versions: { tidemark: "0.1.0", qemu: "7.2.22" },
    configuration: { cpus: 2 },
    disks,
  };
}

/** A valid manifest that no storage has to hold: a full point of one disk. */
export function sampleManifest(changes: Partial<PointManifest> = {}): PointManifest {
  const id = changes.id ?? pointId(1);
  return { ...pointManifest({ machine: "web", id, disks: [] }, [sampleDisk(id)]), ...changes };
}

/** A valid disk for it. Segments: 64 KiB of frames, then tables, then the header. */
export function sampleDisk(point: string, changes: Partial<DiskManifest> = {}): DiskManifest {
  const digest = (text: string): string => createHash("sha256").update(text).digest("hex");
  const segments = [
    { offset: 65_536, length: 1000, sha256: digest("frames"), kind: "data" },
    { offset: 66_536, length: 200_000, sha256: digest("tables"), kind: "table" },
    { offset: 0, length: 65_536, sha256: digest("header"), kind: "header" },
  ] as const;
  const all = createHash("sha256");
  for (const segment of segments) all.update(segment.sha256, "hex");
  return {
    ...{ name: "sda", token: "00c0ffee", qdev: null, virtualSize: 1 << 20, clusterSize: 65_536 },
    ...{ kind: "full", reason: "first backup of this disk", parent: null, image: "sda.qcow2" },
    ...{ bytes: 266_536, sha256: all.digest("hex"), segments, dataClusters: 3, zeroClusters: 1 },
    ...{ dirtyBytes: 196_608, garbageBytes: 0 },
    bitmap: formatBitmapName({ repository: "0a1b2c3d", checkpoint: point, token: "00c0ffee" }),
    ...changes,
  };
}
