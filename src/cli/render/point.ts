import { storedBytesOf, type PointManifest } from "../../repository/index.js";

/** The JSON shape of a point, a contract with scripts. */
export function pointView(point: PointManifest, current: boolean): Record<string, unknown> {
  return {
    id: point.id,
    machine: point.machine.name,
    name: point.name,
    description: point.description,
    created: point.created,
    parent: point.parent,
    current,
    state: point.state,
    consistency: point.consistency,
    disks: point.disks.map((disk) => ({
      name: disk.name,
      token: disk.token,
      qdev: disk.qdev,
      kind: disk.kind,
      reason: disk.reason,
      parent: disk.parent,
      virtualSize: disk.virtualSize,
      clusterSize: disk.clusterSize,
      image: disk.image,
      bytes: disk.bytes,
      sha256: disk.sha256,
      hashes: disk.hashes ?? null,
      dataClusters: disk.dataClusters,
      zeroClusters: disk.zeroClusters,
      dirtyBytes: disk.dirtyBytes,
      garbageBytes: disk.garbageBytes,
      bitmap: disk.bitmap,
    })),
  };
}

/** Stored bytes of all disks, hashes included. */
export function storedBytes(point: PointManifest): number {
  return storedBytesOf([point]);
}

/** "full", "incr", or how many of the disks are full: disks decide alone. */
export function kindOf(point: PointManifest): string {
  const full = point.disks.filter(({ kind }) => kind === "full").length;
  if (full === point.disks.length) return "full";
  return full === 0 ? "incr" : `${full}/${point.disks.length} full`;
}
