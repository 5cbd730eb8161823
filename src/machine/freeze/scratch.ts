import { chmod, stat, statfs } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { TidemarkError, UsageError } from "../../errors/index.js";
import { formatRunObject } from "../../point/index.js";
import type { DriverOptions, QmpClient } from "../../qmp/index.js";
import { runJob } from "../teardown/jobs.js";
import type { FreezeRequest, SourceDisk } from "../source.js";

/** A scratch file: a qcow2 overlay on the disk's node that gets the old data of what the guest overwrites. */
export interface Scratch {
  /** The disk's number within the run. */
  readonly number: number;
  readonly disk: SourceDisk;
  readonly file: string;
  /** Device number of the file system that holds it. */
  readonly fileSystem: number;
}

/**
 * Decides where each disk's scratch goes. Nothing is made.
 *
 * @throws {UsageError} when a disk's image is no local file and no directory was named
 */
export async function placeScratch(
  request: Pick<FreezeRequest, "disks" | "scratchDirectory">,
  run: string,
): Promise<Scratch[]> {
  return await Promise.all(
    request.disks.map(async ({ disk }, number) => {
      const directory = request.scratchDirectory ?? besideImage(disk);
      const { dev } = await statDirectory(directory, disk);
      const file = join(directory, `${formatRunObject({ run, disk: number, kind: "scr" })}.qcow2`);
      return { number, disk, file, fileSystem: dev };
    }),
  );
}

/**
 * Makes a scratch file and its nodes. QEMU makes the file, so that it may open it whatever its user and its
 * confinement (AppArmor, SELinux) are.
 */
export async function createScratch(
  qmp: QmpClient,
  run: string,
  { number, disk, file }: Scratch,
  options: IoOptions = {},
): Promise<void> {
  const name = (kind: "scr" | "file" | "new"): string => formatRunObject({ run, disk: number, kind });
  const create = (image: DriverOptions): Promise<void> => runJob(qmp, name("new"), image, options);
  const add = (node: DriverOptions & { "node-name": string }): Promise<undefined> =>
    qmp.execute("blockdev-add", node, options);

  await create({ driver: "file", filename: file, size: 0 });
  await hideFromOthers(file);
  await add({ driver: "file", "node-name": name("file"), filename: file });
  await create({ driver: "qcow2", file: name("file"), size: disk.virtualSize });
  await add({ driver: "qcow2", "node-name": name("scr"), file: name("file"), backing: disk.node });
}

/** Bytes free for us on the file system of a directory. */
export async function freeSpace(directory: string): Promise<number> {
  const { bavail, bsize } = await statfs(directory);
  return bavail * bsize;
}

function besideImage(disk: SourceDisk): string {
  if (disk.imageFile !== null) return dirname(disk.imageFile);
  throw new UsageError(
    `Cannot place the scratch file of disk ${disk.name}: its image is no file with a known path`,
    {
      hint: "Name a directory with --scratch",
    },
  );
}

async function statDirectory(directory: string, disk: SourceDisk): Promise<{ dev: number }> {
  try {
    const found = await stat(directory);
    if (found.isDirectory()) return found;
  } catch (cause) {
    const why = (cause as Error).message;
    throw new TidemarkError("TM_SCRATCH", `Cannot place the scratch file of disk ${disk.name}: ${why}`, {
      cause,
      hint: "Name a directory with --scratch that both tidemark and QEMU can use",
    });
  }
  throw new UsageError(`Cannot place the scratch file of disk ${disk.name}: ${directory} is no directory`);
}

/** It holds the guest's old data. QEMU makes files that everybody may read. */
async function hideFromOthers(file: string): Promise<void> {
  try {
    await chmod(file, 0o600);
  } catch (error) {
    // Not the file's owner: then QEMU's own umask and the directory have to protect it.
    if ((error as NodeJS.ErrnoException).code !== "EPERM") throw error;
  }
}
