import { join } from "node:path";
import { run } from "./tools.js";

/** What a disk held at a freeze, as a raw file. */
export interface Reference {
  /** Name of its format node. */
  readonly node: string;
  /** Path of the image that the machine has open. */
  readonly source: string;
  readonly format: string;
  /** The copy. */
  readonly file: string;
}

/** A disk of a freeze before it is copied. */
export type LocatedDisk = Omit<Reference, "file">;

interface BlockDevice {
  readonly device: string;
  readonly inserted?: { readonly "node-name"?: string };
}

interface BlockNode {
  readonly "node-name": string;
  readonly drv: string;
  readonly file: string;
}

/**
 * Finds the image file and its format behind each device or node name.
 *
 * @param execute runs a QMP command
 */
export async function locateDisks(
  devices: readonly string[],
  execute: (command: string) => Promise<unknown>,
): Promise<LocatedDisk[]> {
  const backends = (await execute("query-block")) as BlockDevice[];
  const nodes = (await execute("query-named-block-nodes")) as BlockNode[];
  return devices.map((device) => {
    const backend = device === "" ? undefined : backends.find((one) => one.device === device);
    const name = backend?.inserted?.["node-name"] ?? device;
    const node = nodes.find((one) => one["node-name"] === name);
    if (node === undefined) throw new Error(`Reference: QEMU has neither device nor node ${device}`);
    return { node: name, source: node.file, format: node.drv };
  });
}

/** Copies disks that nobody writes to now, whole chains, to `<directory>/<freeze>-<number>.raw`. */
export async function copyReferences(
  disks: readonly LocatedDisk[],
  directory: string,
  freeze: number,
): Promise<Reference[]> {
  return Promise.all(
    disks.map(async (disk, index) => {
      const file = join(directory, `${freeze}-${index}.raw`);
      // A json: name says its driver itself.
      const format = disk.source.startsWith("json:") ? [] : ["-f", disk.format];
      await run("qemu-img", ["convert", "-U", ...format, "-O", "raw", disk.source, file]);
      return { ...disk, file };
    }),
  );
}
