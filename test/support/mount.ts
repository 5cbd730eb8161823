import { mkdir, truncate, writeFile } from "node:fs/promises";
import { run } from "./tools.js";

/** Mounts something on a directory; the mount ends before the directory is removed that it is in. */
export async function mounted(directory: string, ...args: string[]): Promise<AsyncDisposable> {
  await run("mount", [...args, directory]);
  return {
    async [Symbol.asyncDispose]() {
      await run("umount", ["-l", directory]);
    },
  };
}

/** How file systems are made in a file. */
const MAKE = {
  ext4: ["mkfs.ext4", "-q"],
  xfs: ["mkfs.xfs", "-q", "-m", "reflink=1"],
  btrfs: ["mkfs.btrfs", "-q"],
} as const;
export type FileSystem = keyof typeof MAKE;

/** Makes a file system in a file `<directory>.image`, and mounts it on a new directory. */
export async function newFileSystem(
  kind: FileSystem,
  directory: string,
  bytes: number,
): Promise<AsyncDisposable> {
  const [command, ...args] = MAKE[kind];
  const image = `${directory}.image`;
  await writeFile(image, "");
  await truncate(image, bytes);
  await run(command, [...args, image]);
  await mkdir(directory);
  return await mounted(directory, "-o", "loop", image);
}
