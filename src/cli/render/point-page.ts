import { formatSize } from "../../bytes/index.js";
import type { DiskCost, RestoreCost } from "../../inspect/index.js";
import type { DiskManifest, PointManifest } from "../../repository/index.js";
import { renderTable, type Column } from "./table.js";
import { formatTime } from "./time.js";

/** All that `show` says of a point. */
export interface PointPage {
  readonly point: PointManifest;
  readonly isCurrent: boolean;
  /** All points of the machine that can be read. */
  readonly points: readonly PointManifest[];
  /** Ids of the points that it needs, itself first. */
  readonly chain: readonly string[];
  /** Ids. */
  readonly children: readonly string[];
  readonly restore: RestoreCost;
}

const right = (title: string): Column => ({ title, align: "right" });
const COLUMNS = [
  ...[{ title: "DISK" }, { title: "KIND" }],
  ...["SIZE", "STORED", "DATA", "ZEROES", "GARBAGE", "READ"].map(right),
];

/** A point for people. @param images also says what is read of each image */
export function renderPoint(page: PointPage, images: boolean): string {
  const { point, restore } = page;
  const head = factsOf(page).map(([title, value]) => `${title.padEnd(12)} ${value}\n`);
  const costs = new Map(restore.disks.map((disk) => [disk.name, disk]));
  const table = renderTable(
    COLUMNS,
    point.disks.map((disk) => diskCells(disk, costs.get(disk.name))),
  );
  const sections = [
    point.disks.flatMap(explainKind),
    point.disks.flatMap((disk) => explainCost(disk, costs.get(disk.name))),
    images ? restore.disks.flatMap(imageLines) : [],
  ].filter((lines) => lines.length > 0);
  return [head.join(""), table, ...sections.map((lines) => lines.join(""))].join("\n");
}

function factsOf({ point, isCurrent, points, chain, children }: PointPage): [string, string][] {
  const { machine, id, name, description, created, state, consistency, versions, parent } = point;
  const named = (other: string): string => {
    const found = points.find((candidate) => candidate.id === other);
    if (found?.tombstone === true) return `${other} (forgotten)`;
    return found?.name == null ? other : `${other} (${found.name})`;
  };
  const count = `${chain.length} ${chain.length === 1 ? "point" : "points"}`;
  return [
    ["point", `${machine.name}@${id}${isCurrent ? "  (current)" : ""}`],
    ...(name === null ? [] : [["name", name] as [string, string]]),
    ...(description === null ? [] : [["description", description] as [string, string]]),
    ["created", `${formatTime(created)}, machine ${state}, ${consistency}-consistent`],
    ["machine", `${machine.uuid ?? "no uuid"}, QEMU ${versions.qemu ?? "unknown"}`],
    ["parent", parent === null ? "none" : named(parent)],
    ["children", children.length === 0 ? "none" : children.map(named).join(`\n${" ".repeat(13)}`)],
    ["chain", `${count}, down to ${chain.at(-1) ?? id}`],
  ];
}

function diskCells(disk: DiskManifest, cost: DiskCost | undefined): string[] {
  const { name, kind, virtualSize, bytes, dataClusters, zeroClusters, clusterSize, garbageBytes } = disk;
  const share = bytes === 0 || garbageBytes === 0 ? "" : ` (${percent(garbageBytes, bytes)})`;
  return [
    ...[name, kind === "full" ? "full" : "incr", formatSize(virtualSize), formatSize(bytes)],
    ...[dataClusters, zeroClusters].map((clusters) => formatSize(clusters * clusterSize)),
    ...[formatSize(garbageBytes) + share, cost?.bytes == null ? "?" : formatSize(cost.bytes)],
  ];
}

const percent = (part: number, whole: number): string => `${Math.ceil((100 * part) / whole)}%`;

function explainKind({ name, kind, reason }: DiskManifest): string[] {
  if (reason === null) return [];
  return [`${name} is ${kind}${kind === "full" ? ":" : ","} ${reason}\n`];
}

/** What a restore reads, next to what the chain takes: the rest is what later points have overwritten. */
function explainCost({ name, parent }: DiskManifest, cost: DiskCost | undefined): string[] {
  if (cost === undefined) return [];
  if (cost.bytes === null) return [`${name} cannot be restored: ${cost.problem ?? "damaged"}\n`];
  if (parent === null) return [];
  const stored = cost.images.reduce((sum, image) => sum + image.stored, 0);
  const used = cost.images.filter(({ bytes }) => bytes > 0).length;
  return [
    `${name}: restoring reads ${formatSize(cost.bytes)} of ${used} of its chain's ${cost.images.length} images, which take ${formatSize(stored)}\n`,
  ];
}

function imageLines({ name, images }: DiskCost): string[] {
  if (images.length === 0) return [];
  const rows = images.map(({ point, bytes, stored }) => [point, formatSize(bytes), formatSize(stored)]);
  return [`${name}\n`, renderTable([{ title: "IMAGE OF POINT" }, right("READ"), right("STORED")], rows)];
}
