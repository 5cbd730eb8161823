import { readdir, readlink, stat } from "node:fs/promises";
import { join } from "node:path";
import { sha256OfFile } from "../support/image.js";
import type { TestMonitor } from "../support/monitor.js";
import type { Rig } from "../support/rig.js";

interface Bitmap {
  readonly name?: string;
  readonly count: number;
  readonly recording: boolean;
}

/** Everything that a command which changes nothing must leave as it is. */
export interface World {
  /** Every file and directory below the repository, with the digest of what it holds. */
  readonly repository: readonly string[];
  /** Nodes that have names, with their bitmaps; jobs; exports. */
  readonly qemu: readonly string[];
  /** Scratch files, directories of sockets, state files. */
  readonly files: readonly string[];
}

export async function worldOf(rig: Rig): Promise<World> {
  return {
    repository: await treeOf(rig.repository),
    qemu: await stateOf(rig.machine.monitor),
    files: (await readdir(rig.directory.path, { recursive: true }))
      .filter((name) => /(^|\/)tm-/.test(name) || /^run\/.*\.json/.test(name))
      .concat((await readdir(rig.machine.directory)).filter((name) => name.startsWith("tm-"))),
  };
}

/** Files and directories below a directory, with digests. */
export async function treeOf(directory: string): Promise<string[]> {
  const names = (await readdir(directory, { recursive: true })).sort();
  return await Promise.all(
    names.map(async (name) => {
      const path = join(directory, name);
      const found = await stat(path).catch(() => undefined);
      if (found === undefined) return `${name} -> ${await readlink(path)}`;
      return found.isDirectory() ? `${name}/` : `${name} ${await sha256OfFile(path)}`;
    }),
  );
}

async function stateOf(monitor: TestMonitor): Promise<string[]> {
  const nodes =
    await monitor.execute<{ "node-name": string; "dirty-bitmaps"?: Bitmap[] }[]>("query-named-block-nodes");
  const jobs = await monitor.execute<{ id: string; status: string }[]>("query-jobs");
  const exports = await monitor.execute<{ id: string }[]>("query-block-exports");
  return [
    ...nodes.flatMap((node) => [
      `node ${node["node-name"]}`,
      ...(node["dirty-bitmaps"] ?? []).map(
        ({ name, count, recording }) =>
          `bitmap ${name ?? "(unnamed)"} on ${node["node-name"]}: ${count}, ${recording ? "recording" : "not recording"}`,
      ),
    ]),
    ...jobs.map(({ id, status }) => `job ${id}: ${status}`),
    ...exports.map(({ id }) => `export ${id}`),
  ].sort();
}
