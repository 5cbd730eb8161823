import { createCipheriv, createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { pipeline } from "node:stream/promises";
import { KiB } from "../../src/bytes/index.js";
import { run } from "./tools.js";

/** Formats of disk images that tests use. */
export type ImageFormat = "qcow2" | "raw";

/**
 * Makes an image with `qemu-img create`.
 *
 * @param size bytes of the virtual disk
 * @param options qcow2 creation options, `{ cluster_size: "64k" }`, and a backing file
 * @returns the path
 */
export async function createImage(
  path: string,
  format: ImageFormat,
  size: number,
  options: {
    readonly create?: Readonly<Record<string, string>>;
    readonly backing?: { readonly path: string; readonly format: ImageFormat };
  } = {},
): Promise<string> {
  const { create = {}, backing } = options;
  const settings = Object.entries(create).map(([key, value]) => `${key}=${value}`);
  await run("qemu-img", [
    ...["create", "-q", "-f", format],
    ...(settings.length === 0 ? [] : ["-o", settings.join(",")]),
    ...(backing === undefined ? [] : ["-b", backing.path, "-F", backing.format]),
    ...[path, String(size)],
  ]);
  return path;
}

/** What `qemu-img info` says; the fields that tests look at. */
export interface ImageInfo {
  readonly format: string;
  readonly "virtual-size": number;
  readonly "actual-size": number;
  readonly "cluster-size"?: number;
  readonly "backing-filename"?: string;
  readonly "full-backing-filename"?: string;
  readonly "format-specific"?: {
    readonly data: {
      readonly compat?: string;
      readonly "compression-type"?: string;
      readonly "refcount-bits"?: number;
      readonly corrupt?: boolean;
      readonly bitmaps?: readonly {
        readonly name: string;
        readonly flags: readonly string[];
        readonly granularity: number;
      }[];
    };
  };
}

/** `qemu-img info` of an image; also of one that a machine has open, whose file may lag behind. */
export async function imageInfo(path: string, format?: ImageFormat): Promise<ImageInfo> {
  const { stdout } = await run("qemu-img", ["info", "-U", "--output=json", ...formatOf(format), path]);
  return JSON.parse(stdout) as ImageInfo;
}

/** One range of `qemu-img map`. */
export interface MapRange {
  readonly start: number;
  readonly length: number;
  /** Which image of the chain has it: 0 is the top one. */
  readonly depth: number;
  readonly present: boolean;
  readonly zero: boolean;
  readonly data: boolean;
  readonly offset?: number;
}

/** `qemu-img map` of an image through its whole chain. */
export async function imageMap(path: string, format?: ImageFormat): Promise<readonly MapRange[]> {
  const { stdout } = await run("qemu-img", ["map", "--output=json", ...formatOf(format), path]);
  return JSON.parse(stdout) as MapRange[];
}

/** What `qemu-img check` found. */
export interface CheckReport {
  readonly errors: number;
  readonly corruptions: number;
  readonly leaks: number;
  /** Everything that it printed, for the message of a failed assertion. */
  readonly report: string;
}

/** `qemu-img check` of a qcow2 image: `expect(await checkImage(path)).toMatchObject(CLEAN)`. */
export async function checkImage(path: string): Promise<CheckReport> {
  const { stdout, stderr } = await run("qemu-img", ["check", "--output=json", "-f", "qcow2", path], {
    codes: [0, 1, 2, 3],
  });
  const found = stdout === "" ? undefined : (JSON.parse(stdout) as Record<string, number>);
  return {
    errors: found === undefined ? 1 : (found["check-errors"] ?? 0),
    corruptions: found?.["corruptions"] ?? 0,
    leaks: found?.["leaks"] ?? 0,
    report: stdout + stderr,
  };
}

/** An image without errors, corruptions and leaks. */
export const CLEAN = { errors: 0, corruptions: 0, leaks: 0 } as const;

/** A side of a comparison: an image with its format, or a path whose format `qemu-img` finds out. */
export type ImageReference = string | { readonly path: string; readonly format: ImageFormat };

/**
 * Compares the content of two disks with `qemu-img compare`. Sizes must be equal too.
 *
 * @param options.strict also compares what is allocated (`-s`)
 * @returns "identical", or qemu-img's sentence about the first difference
 */
export async function compareImages(
  a: ImageReference,
  b: ImageReference,
  options: { readonly strict?: boolean } = {},
): Promise<string> {
  const [left, right] = [a, b].map((side) => (typeof side === "string" ? { path: side } : side)) as [
    { path: string; format?: ImageFormat },
    { path: string; format?: ImageFormat },
  ];
  const { code, stdout, stderr } = await run(
    "qemu-img",
    [
      ...["compare", "-U", ...(options.strict === true ? ["-s"] : [])],
      ...(left.format === undefined ? [] : ["-f", left.format]),
      ...(right.format === undefined ? [] : ["-F", right.format]),
      ...[left.path, right.path],
    ],
    { codes: [0, 1] },
  );
  // Without -s a longer disk whose tail is zero passes with a warning only.
  const report = (stdout + stderr).trim();
  return code === 0 && !report.includes("size mismatch") ? "identical" : report;
}

/** Converts an image, with its chain, to a sparse raw file. `live`: a machine has it open. */
export async function toRaw(
  source: string,
  format: ImageFormat,
  target: string,
  options: { readonly live?: boolean } = {},
): Promise<string> {
  const share = options.live === true ? ["-U"] : [];
  await run("qemu-img", ["convert", ...share, "-f", format, "-O", "raw", source, target]);
  return target;
}

/** SHA-256, in hex, of the bytes of the virtual disk (not of the file). */
export async function sha256OfDisk(path: string, format: ImageFormat): Promise<string> {
  if (format === "raw") return sha256OfFile(path);
  const directory = await mkdtemp(join(dirname(path), "sha-"));
  try {
    return await sha256OfFile(await toRaw(path, format, join(directory, "disk.raw")));
  } finally {
    await rm(directory, { recursive: true });
  }
}

/** SHA-256, in hex, of a file. */
export async function sha256OfFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  await pipeline(createReadStream(path, { highWaterMark: 1024 * KiB }), hash);
  return hash.digest("hex");
}

/** Runs `qemu-io` commands on an image that no machine has open. @throws when one of them fails */
export async function qemuIo(
  path: string,
  format: ImageFormat,
  commands: readonly string[],
): Promise<string> {
  const { stdout } = await run("qemu-io", [
    ...["-f", format, "-d", "unmap"],
    ...commands.flatMap((command) => ["-c", command]),
    path,
  ]);
  // Some versions end with 0 although a pattern did not match or a write failed.
  const failure = failureOf(stdout);
  if (failure !== undefined) throw new Error(`qemu-io on ${path}: ${failure}`);
  return stdout;
}

/** The line in which `qemu-io` reports a failure; undefined when there is none. */
export function failureOf(output: string): string | undefined {
  return output.split("\n").find((line) => /failed|invalid|not found|not supported|error/i.test(line));
}

/** Size of the clusters in the image language, unless said otherwise. */
export const PATTERN_CLUSTER = 64 * KiB;

/**
 * The one-line image language: one character a cluster, spaces ignored.
 *
 *     A-Z a-z 1-9   written, filled with the character's code
 *     0             written as zero          (write -z)
 *     ~             written as zero, may be deallocated  (write -z -u)
 *     !             discarded                (discard)
 *     -             not touched
 *
 * So "A0-B" on a new disk: A's, an explicit zero cluster, an unallocated one, B's.
 *
 * @returns `qemu-io` commands, for `qemuIo` here or `TestMachine.qemuIo`
 */
export function patternCommands(
  pattern: string,
  options: { readonly clusterSize?: number; readonly offset?: number } = {},
): string[] {
  const { clusterSize = PATTERN_CLUSTER, offset = 0 } = options;
  const clusters = clustersOf(pattern);
  return clusters.flatMap((cluster, index) => {
    const place = `${offset + index * clusterSize} ${clusterSize}`;
    if (cluster === "-") return [];
    if (cluster === "0") return [`write -z ${place}`];
    if (cluster === "~") return [`write -z -u ${place}`];
    if (cluster === "!") return [`discard ${place}`];
    if (/^[A-Za-z1-9]$/.test(cluster)) return [`write -P ${cluster.charCodeAt(0)} ${place}`];
    throw new Error(`Image pattern "${pattern}": "${cluster}" means nothing`);
  });
}

/** Writes a pattern of the image language to an image that no machine has open. */
export async function writePattern(
  path: string,
  format: ImageFormat,
  pattern: string,
  options: { readonly clusterSize?: number; readonly offset?: number } = {},
): Promise<void> {
  const commands = patternCommands(pattern, options);
  if (commands.length > 0) await qemuIo(path, format, commands);
}

/**
 * The bytes that a pattern describes; "-", "!" and "~" are zero, as on a new disk.
 * Several patterns are laid over one another, in order: "-" leaves what is below.
 */
export function patternBytes(patterns: string | readonly string[], clusterSize = PATTERN_CLUSTER): Buffer {
  const layers = (typeof patterns === "string" ? [patterns] : patterns).map(clustersOf);
  const bytes = Buffer.alloc(Math.max(...layers.map((layer) => layer.length)) * clusterSize);
  for (const layer of layers) {
    for (const [index, cluster] of layer.entries()) {
      if (cluster === "-") continue;
      const fill = "0~!".includes(cluster) ? 0 : cluster.charCodeAt(0);
      bytes.fill(fill, index * clusterSize, (index + 1) * clusterSize);
    }
  }
  return bytes;
}

/**
 * Writes a raw file of bytes that do not compress, the same for the same seed: for `write -s <file>` of
 * qemu-io, or as a disk.
 */
export async function writeNoise(path: string, length: number, seed: number): Promise<string> {
  const key = createHash("sha256").update(String(seed)).digest();
  const stream = createCipheriv("aes-256-ctr", key, Buffer.alloc(16));
  await writeFile(path, stream.update(Buffer.alloc(length)));
  return path;
}

function clustersOf(pattern: string): string[] {
  return Array.from(pattern.replaceAll(" ", ""));
}

function formatOf(format: ImageFormat | undefined): string[] {
  return format === undefined ? [] : ["-f", format];
}
