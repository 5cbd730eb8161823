import { QmpRecord } from "./record.js";

/** The parts of replies that tidemark relies on, decoded and checked. Names follow the QAPI schema. */

/** A dirty bitmap (BlockDirtyInfo). Internal bitmaps of jobs have no name and are left out. */
export interface BitmapInfo {
  readonly name: string;
  /** Bytes marked dirty. */
  readonly count: number;
  /** Bytes per bit. */
  readonly granularity: number;
  readonly recording: boolean;
  readonly busy: boolean;
  readonly persistent: boolean;
  readonly inconsistent: boolean;
}

/** What a node knows of its image (ImageInfo). */
export interface ImageInfo {
  /** Bytes of the virtual disk. */
  readonly virtualSize: number;
  readonly format: string;
  readonly filename: string;
  /** qcow2 only: "0.10" or "1.1"; only the latter stores bitmaps. */
  readonly compat: string | undefined;
  /** Bytes per cluster; 0 for formats without clusters. */
  readonly clusterSize: number;
}

/** A node of the block graph (BlockDeviceInfo). */
export interface BlockNode {
  readonly name: string;
  readonly driver: string;
  readonly readOnly: boolean;
  /** File name, or a `json:{}` text when a plain name cannot say it. */
  readonly file: string;
  readonly image: ImageInfo;
  readonly bitmaps: readonly BitmapInfo[];
}

/** A guest's block device, or a drive that no device uses (BlockInfo). */
export interface BlockDevice {
  /** Drive id; "" for a device that was given a node. */
  readonly device: string;
  /** Device id or QOM path; undefined when no device uses the drive. */
  readonly qdev: string | undefined;
  readonly removable: boolean;
  readonly inserted: BlockNode | undefined;
}

/** A job (JobInfo). */
export interface JobInfo {
  readonly id: string;
  readonly type: string;
  readonly status: string;
  readonly error: string | undefined;
}

/** A block export (BlockExportInfo). */
export interface ExportInfo {
  readonly id: string;
  readonly type: string;
  readonly nodeName: string;
  readonly shuttingDown: boolean;
}

export interface GraphNode {
  readonly id: number;
  readonly type: "block-backend" | "block-job" | "block-driver";
  readonly name: string;
}

export interface GraphEdge {
  readonly parent: number;
  readonly child: number;
  /** The child's role: "file", "backing", "root", "target" … */
  readonly name: string;
}

/** Who stands on whom (XDbgBlockGraph). */
export interface BlockGraph {
  readonly nodes: readonly GraphNode[];
  readonly edges: readonly GraphEdge[];
}

/** Statistics of a node (BlockStats). */
export interface NodeStatistics {
  readonly nodeName: string | undefined;
  /** The end of the highest write so far, in bytes. */
  readonly highestWrite: number;
}

export interface QomProperty {
  readonly name: string;
  /** "string", "link<iothread>", "child<scsi-hd>" … */
  readonly type: string;
}

export function decodeBlockDevices(value: unknown): BlockDevice[] {
  return QmpRecord.listOf(value, "reply to query-block").map((device) => {
    const inserted = device.optionalRecord("inserted");
    return {
      device: device.text("device"),
      qdev: device.optionalText("qdev"),
      removable: device.flag("removable"),
      inserted: inserted === undefined ? undefined : decodeNode(inserted),
    };
  });
}

export function decodeNodes(value: unknown): BlockNode[] {
  return QmpRecord.listOf(value, "reply to query-named-block-nodes").map(decodeNode);
}

function decodeNode(node: QmpRecord): BlockNode {
  const image = node.record("image");
  return {
    name: node.text("node-name"),
    driver: node.text("drv"),
    readOnly: node.flag("ro"),
    file: node.text("file"),
    image: {
      virtualSize: image.size("virtual-size"),
      format: image.text("format"),
      filename: image.text("filename"),
      clusterSize: image.has("cluster-size") ? image.size("cluster-size") : 0,
      compat: image.optionalRecord("format-specific")?.optionalRecord("data")?.optionalText("compat"),
    },
    bitmaps: node.records("dirty-bitmaps").flatMap(decodeBitmap),
  };
}

function decodeBitmap(bitmap: QmpRecord): BitmapInfo[] {
  const name = bitmap.optionalText("name");
  if (name === undefined || name === "") return [];
  return [
    {
      name,
      count: bitmap.size("count"),
      granularity: bitmap.size("granularity"),
      recording: bitmap.flag("recording"),
      busy: bitmap.flag("busy"),
      persistent: bitmap.flag("persistent"),
      inconsistent: bitmap.optionalFlag("inconsistent") ?? false,
    },
  ];
}

export function decodeJobs(value: unknown): JobInfo[] {
  return QmpRecord.listOf(value, "reply to query-jobs").map((job) => ({
    id: job.text("id"),
    type: job.text("type"),
    status: job.text("status"),
    error: job.optionalText("error"),
  }));
}

export function decodeExports(value: unknown): ExportInfo[] {
  return QmpRecord.listOf(value, "reply to query-block-exports").map((item) => ({
    id: item.text("id"),
    type: item.text("type"),
    nodeName: item.text("node-name"),
    shuttingDown: item.flag("shutting-down"),
  }));
}

/** `isSource`: it was sent from here; whoever receives a machine measures no time. */
export function decodeMigration(value: unknown): { status: string | undefined; isSource: boolean } {
  const migration = QmpRecord.of(value, "reply to query-migrate");
  return { status: migration.optionalText("status"), isSource: migration.has("total-time") };
}

export function decodeGraph(value: unknown): BlockGraph {
  const graph = QmpRecord.of(value, "reply to x-debug-query-block-graph");
  return {
    nodes: graph.records("nodes").map((node) => ({
      id: node.size("id"),
      type: node.text("type") as GraphNode["type"],
      name: node.text("name"),
    })),
    edges: graph.records("edges").map((edge) => ({
      parent: edge.size("parent"),
      child: edge.size("child"),
      name: edge.text("name"),
    })),
  };
}

export function decodeStatistics(value: unknown): NodeStatistics[] {
  return QmpRecord.listOf(value, "reply to query-blockstats").map((item) => ({
    nodeName: item.optionalText("node-name"),
    highestWrite: item.record("stats").size("wr_highest_offset"),
  }));
}

export function decodeProperties(value: unknown): QomProperty[] {
  return QmpRecord.listOf(value, "reply to qom-list").map((item) => ({
    name: item.text("name"),
    type: item.text("type"),
  }));
}
