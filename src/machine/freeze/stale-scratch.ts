import { readdir, rm, stat, statfs } from "node:fs/promises";
import { uptime } from "node:os";
import { basename, dirname, join } from "node:path";
import { parseRunObject } from "../../point/index.js";
import { pathOf } from "../run/run-record.js";
import type { Scratch } from "./scratch.js";

/**
 * Types of statfs(2) of file systems that one host has alone: ext, XFS, Btrfs, ZFS, F2FS, tmpfs, overlayfs. On others a
 * file may belong to a machine that runs elsewhere.
 */
const LOCAL_FILE_SYSTEMS = new Set([
  0xef53, 0x58465342, 0x9123683e, 0x2fc12fc1, 0xf2f52010, 0x01021994, 0x794c7630,
]);

/**
 * Removes scratch files of runs that ended with this host, beside those that a new run makes: a power failure takes QEMU
 * and the state files (which are in memory), and nobody else would ever know of them.
 *
 * @param runDirectory a run with a state file there is judged by that alone
 * @throws the system's error when one cannot be removed
 */
export async function removeStaleScratch(scratch: readonly Scratch[], runDirectory: string): Promise<void> {
  const boot = Date.now() - uptime() * 1000;
  for (const directory of new Set(scratch.map(({ file }) => dirname(file)))) {
    if (!LOCAL_FILE_SYSTEMS.has((await statfs(directory)).type)) continue;
    for (const name of await readdir(directory)) {
      const object = parseRunObject(basename(name, ".qcow2"));
      if (object?.kind !== "scr" || !name.endsWith(".qcow2")) continue;
      const file = join(directory, name);
      const written = await timeOf(file);
      // QEMU has written to it when it made it: one from before this host's start has no QEMU any more.
      if (written === undefined || written >= boot) continue;
      if ((await timeOf(pathOf(runDirectory, object.run))) === undefined) await rm(file, { force: true });
    }
  }
}

/** When a file was last written, in milliseconds; undefined when it is not there. */
async function timeOf(path: string): Promise<number | undefined> {
  try {
    return (await stat(path)).mtimeMs;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}
