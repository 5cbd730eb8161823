import type { FrozenPoint, MachineIdentity } from "../machine/index.js";
import {
  hashesFileOf,
  imageFileOf,
  MANIFEST_FORMAT,
  type DiskManifest,
  type PointManifest,
} from "../repository/index.js";
import type { DiskPlan } from "./disk-plan.js";
import type { DiskSummary } from "./disk-writer.js";

/** A disk whose image is finished. */
export interface StoredDisk {
  readonly plan: DiskPlan;
  readonly summary: DiskSummary;
  /** Bytes that the bitmap showed as changed; null in a full. */
  readonly dirtyBytes: number | null;
}

/** What a manifest says besides its disks. */
export interface PointFacts {
  readonly id: string;
  /** The machine's name in the repository. */
  readonly machine: string;
  readonly identity: MachineIdentity;
  readonly frozen: Pick<FrozenPoint, "disks" | "frozenAt" | "state">;
  /** Id of the point before this one; null for the first. */
  readonly parent: string | null;
  readonly name?: string | undefined;
  readonly description?: string | undefined;
  /** How many checkpoints stay in the machine, this one included. */
  readonly keepCheckpoints: number;
  readonly tidemarkVersion: string;
}

/** The manifest of a point. */
export function describePoint(facts: PointFacts, disks: readonly StoredDisk[]): PointManifest {
  const { id, machine, identity, frozen, parent, name, description, tidemarkVersion } = facts;
  return {
    format: MANIFEST_FORMAT,
    id,
    machine: { name: machine, uuid: identity.uuid },
    name: name ?? null,
    description: description ?? null,
    created: frozen.frozenAt.toISOString(),
    state: frozen.state,
    consistency: frozen.state === "shut off" ? "offline" : "crash",
    parent,
    versions: { tidemark: tidemarkVersion, qemu: identity.qemuVersion },
    configuration: { ...identity.configuration },
    keepCheckpoints: facts.keepCheckpoints,
    disks: disks.map((disk, index) => describeDisk(disk, frozen.disks[index]?.bitmap ?? null)),
  };
}

function describeDisk({ plan, summary, dirtyBytes }: StoredDisk, bitmap: string | null): DiskManifest {
  const { disk, name, token, clusterSize, base, reason } = plan;
  const { image, hashes } = summary;
  return {
    name,
    token,
    qdev: disk.qdev,
    virtualSize: disk.virtualSize,
    clusterSize,
    kind: base === undefined ? "full" : "incremental",
    reason,
    parent: base?.checkpoint ?? null,
    image: imageFileOf(name),
    bytes: image.length,
    sha256: image.sha256,
    segments: image.segments,
    hashes: hashes === null ? null : { file: hashesFileOf(name), ...hashes },
    dataClusters: image.dataClusters,
    zeroClusters: image.zeroClusters,
    dirtyBytes,
    garbageBytes: 0,
    bitmap,
  };
}
