import { isAbsolute } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { parseRunObject } from "../../point/index.js";
import type { BlockDevice, BlockNode, QmpClient } from "../../qmp/index.js";
import { hiddenDevices, inspectDevice, type DeviceFacts } from "./device.js";
import { NodeGraph } from "./graph.js";
import { suggestNames, type Selectable } from "./select.js";
import type { SourceBitmap, SourceDisk } from "../source.js";

/** What the block graph tells of a disk, whoever uses it. */
export interface DiskNode extends Pick<
  SourceDisk,
  | "qdev"
  | "node"
  | "virtualSize"
  | "format"
  | "imageFile"
  | "canPersist"
  | "imageClusterSize"
  | "bitmaps"
  | "backing"
> {
  /** Node names: the format node's and that of the node that is used. */
  readonly nodes: readonly string[];
  /** Jobs of others that work on the disk. */
  readonly foreignJobs: readonly string[];
}

/** A disk of a live machine, with what a freeze has to know of it. */
export interface LiveDisk extends Omit<SourceDisk, "name">, Selectable {
  readonly deviceType: string;
  readonly serial: string | null;
  readonly iothread: string | null;
  /** Jobs of others that work on the disk. */
  readonly foreignJobs: readonly string[];
}

/** A disk that cannot be backed up, and why. */
export interface RefusedDisk extends Selectable {
  readonly reason: string;
}

export interface Discovery {
  readonly disks: readonly LiveDisk[];
  readonly refused: readonly RefusedDisk[];
}

/** Their SG_IO commands go to the host's device past all nodes: bitmaps and copy-before-write miss them. */
const PASS_THROUGH = new Set(["scsi-block", "scsi-generic"]);

/** A local file or device: what "beside the image" and "free space" mean something for. */
const LOCAL_DRIVERS = new Set(["file"]);

/**
 * Finds a machine's disks: what a device writes to, neither removable nor read-only, `-drive` and `-blockdev`
 * alike. Filters on top (throttling, jobs) are looked through to the format node, which carries the bitmaps.
 */
export async function discover(qmp: QmpClient, options: IoOptions = {}): Promise<Discovery> {
  const [devices, nodes, graph, hidden] = await Promise.all([
    qmp.execute("query-block", undefined, options),
    qmp.execute("query-named-block-nodes", { flat: true }, options),
    qmp.execute("x-debug-query-block-graph", undefined, options),
    hiddenDevices(qmp, options),
  ]);
  const nodeGraph = new NodeGraph(nodes, graph);
  const found = await Promise.all(devices.map((device) => inspectDisk(qmp, device, nodeGraph, options)));
  const writable = found.filter((disk) => disk !== undefined);
  const disks = writable.filter((disk) => !PASS_THROUGH.has(disk.deviceType));
  const names = suggestNames(disks);
  return {
    disks: disks.map((disk, index) => ({
      ...disk,
      suggestedName: names[index]?.name ?? "",
      anonymous: names[index]?.anonymous ?? true,
    })),
    refused: [
      ...writable.filter((disk) => PASS_THROUGH.has(disk.deviceType)).map(refusePassThrough),
      ...hidden.map(({ device, type }) => ({
        deviceId: device,
        driveId: null,
        qdev: device,
        nodes: [],
        reason: `it is a ${type}: another process serves it, QEMU does not see what it writes`,
      })),
    ],
  };
}

type UnnamedDisk = Omit<LiveDisk, "suggestedName" | "anonymous">;

async function inspectDisk(
  qmp: QmpClient,
  { device, qdev, removable, inserted }: BlockDevice,
  graph: NodeGraph,
  options: IoOptions,
): Promise<UnnamedDisk | undefined> {
  // Without a device (qdev) it is a drive that no guest sees.
  if (removable || inserted === undefined || qdev === undefined) return undefined;
  const node = describeNode(graph, inserted.name, qdev);
  if (node === undefined) return undefined;
  const facts: DeviceFacts = await inspectDevice(qmp, qdev, options);
  return {
    ...node,
    qdev,
    deviceId: facts.deviceId,
    driveId: device === "" ? null : device,
    deviceType: facts.type,
    serial: facts.serial,
    iothread: facts.iothread,
  };
}

/**
 * Describes the disk whose topmost node is `root`, looking through filters to the format node.
 *
 * @param qdev the device that uses it; null when none does
 * @returns undefined when it is read-only
 */
export function describeNode(graph: NodeGraph, root: string, qdev: string | null): DiskNode | undefined {
  const chain = graph.filterChain(root);
  const top = chain.at(-1);
  if (top === undefined || top.readOnly) return undefined;
  const below = graph.backingChain(top.name);
  return {
    qdev,
    nodes: [...new Set([root, top.name])],
    node: top.name,
    virtualSize: top.image.virtualSize,
    format: top.driver,
    imageFile: imageFileOf(top, graph),
    canPersist: top.driver === "qcow2" && top.image.compat === "1.1",
    imageClusterSize: top.image.clusterSize,
    bitmaps: [top, ...below].flatMap((node) => bitmapsOf(node, node !== top)),
    backing: below.map((node) => ({
      node: node.name,
      virtualSize: node.image.virtualSize,
      imageClusterSize: node.image.clusterSize,
      isFilter: NodeGraph.isFilter(node),
    })),
    foreignJobs: [...new Set(chain.flatMap((node) => graph.jobsOn(node.name)))].filter(
      (job) => parseRunObject(job) === undefined,
    ),
  };
}

/** A relative path is relative to QEMU's directory, which cannot be asked for: as good as none. */
function imageFileOf(top: BlockNode, graph: NodeGraph): string | null {
  const node = graph.protocolNode(top.name);
  if (node === undefined || !LOCAL_DRIVERS.has(node.driver)) return null;
  return isAbsolute(node.file) ? node.file : null;
}

function bitmapsOf(node: BlockNode, isBacking: boolean): SourceBitmap[] {
  return node.bitmaps.map(({ count, ...bitmap }) => ({
    ...bitmap,
    node: node.name,
    readOnly: isBacking || node.readOnly,
    dirtyBytes: count,
  }));
}

function refusePassThrough(disk: UnnamedDisk): RefusedDisk {
  return { ...disk, reason: `it is a ${disk.deviceType}: its SCSI commands bypass QEMU's bitmaps` };
}
