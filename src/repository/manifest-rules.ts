/** What must hold between the fields of a manifest, so that no reader has to ask again. */
import { parseBitmapName } from "../point/index.js";
import { digestOfSegments } from "../qcow2/index.js";
import type { DiskManifest, PointManifest } from "./manifest.js";

/** What contradicts itself in a manifest whose fields are each valid; undefined when nothing does. */
export function manifestProblem(point: PointManifest): string | undefined {
  for (const disk of point.disks) {
    const pending = point.pending?.[disk.name];
    const problem =
      diskProblem(disk) ?? (pending === undefined ? undefined : diskProblem({ ...disk, ...pending }));
    if (problem !== undefined) return `disk "${disk.name}": ${problem}`;
  }
  return pointProblem(point);
}

function diskProblem(disk: DiskManifest): string | undefined {
  const { kind, parent, reason } = disk;
  if (kind === "full" && parent !== null) return "a full image has a parent";
  if (kind === "full" && reason === null) return "a full image has no reason";
  if (kind === "incremental" && parent === null) return "an incremental image has no parent";
  if (disk.dataClusters + disk.zeroClusters > Math.ceil(disk.virtualSize / disk.clusterSize))
    return "it counts more clusters than the disk has";
  return segmentsProblem(disk);
}

function pointProblem(point: PointManifest): string | undefined {
  // Ids are sortable by time, and a child is always the younger one: so no chain can bite its own tail.
  if (point.parent !== null && point.parent >= point.id) return "its parent is not older than itself";
  for (const key of ["name", "token", "image"] as const) {
    const twice = firstDuplicate(point.disks.map((disk) => disk[key]));
    if (twice !== undefined) return `two disks have the ${key} ${JSON.stringify(twice)}`;
  }
  const stranger = Object.keys(point.pending ?? {}).find(
    (name) => !point.disks.some((disk) => disk.name === name),
  );
  if (stranger !== undefined) return `an image of disk "${stranger}" is pending, which it does not hold`;
  const all = [...point.disks, ...Object.values(point.pending ?? {})];
  const twice = firstDuplicate(all.flatMap(({ hashes }) => hashes?.file ?? []));
  if (twice !== undefined) return `two disks have the hashes ${JSON.stringify(twice)}`;
  for (const disk of point.disks) {
    const parents = [disk.parent, point.pending?.[disk.name]?.parent ?? null];
    if (parents.some((parent) => parent !== null && parent >= point.id))
      return `the parent of disk "${disk.name}" is not older than the point`;
    if (disk.bitmap === null) continue;
    const bitmap = parseBitmapName(disk.bitmap);
    if (bitmap?.checkpoint !== point.id || bitmap.token !== disk.token)
      return `the bitmap of disk "${disk.name}" is not this checkpoint's`;
  }
  return undefined;
}

function segmentsProblem(disk: DiskManifest): string | undefined {
  const header = disk.segments.at(-1);
  if (header?.kind !== "header" || header.offset !== 0 || header.length !== disk.clusterSize)
    return "its segments do not end with the header cluster";
  let end = header.length;
  for (const segment of disk.segments.slice(0, -1)) {
    if (segment.kind === "header") return "its segments hold more than one header";
    if (segment.offset !== end) return `its segments are not consecutive at byte ${end}`;
    end += segment.length;
  }
  if (end !== disk.bytes) return `its segments make up ${end} bytes, the image has ${disk.bytes}`;
  if (digestOfSegments(disk.segments) !== disk.sha256) return "its digest is not that of its segments";
  return undefined;
}

function firstDuplicate(values: readonly string[]): string | undefined {
  const seen = new Set<string>();
  return values.find((value) => seen.size === seen.add(value).size);
}
