import { readdir } from "node:fs/promises";
import {
  openLiveMachine,
  type FreezeBase,
  type FreezeRequest,
  type FrozenDisk,
  type LiveMachine,
  type LiveMachineOptions,
  type SourceDisk,
} from "../../src/machine/index.js";
import { newDiskToken, newPointId, parseBitmapName } from "../../src/point/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import type { TestMonitor } from "../support/monitor.js";
import { run } from "../support/tools.js";

export const CLUSTER = 65536;
export const REPOSITORY = "0a1b2c3d";

/** Opens a machine by the path of its QMP socket, without a guard: what it does has tests of its own. */
export function openMachine(
  socket: string,
  runDirectory: string,
  options: Partial<LiveMachineOptions> = {},
): Promise<LiveMachine> {
  return openLiveMachine({ address: parseQmpAddress(socket), runDirectory, guard: false, ...options });
}

/** A request to freeze disks, full each unless a base is named. */
export function freezeRequest(
  disks: readonly SourceDisk[],
  options: Partial<FreezeRequest> & {
    readonly bases?: ReadonlyMap<string, { readonly base: FreezeBase; readonly token: string }>;
  } = {},
): FreezeRequest {
  const { bases, ...rest } = options;
  return {
    checkpoint: newPointId(new Date()),
    repositoryTag: REPOSITORY,
    maxConnections: 8,
    disks: disks.map((disk) => ({
      disk,
      token: bases?.get(disk.name)?.token ?? newDiskToken(),
      base: bases?.get(disk.name)?.base,
      clusterSize: CLUSTER,
    })),
    ...rest,
  };
}

/** The bases that the next increment of these disks starts from. */
export function basesOf(disks: readonly FrozenDisk[]): Map<string, { base: FreezeBase; token: string }> {
  return new Map(
    disks.map(({ disk, bitmap, token }) => [disk.name, { base: { node: disk.node, name: bitmap }, token }]),
  );
}

export function uriOf({ exportName, socket }: FrozenDisk): string {
  return `nbd+unix:///${exportName}?socket=${encodeURIComponent(socket.path)}`;
}

/** Copies a frozen disk to a raw file, by nbdcopy. */
export async function copyFrozen(disk: FrozenDisk, target: string): Promise<string> {
  await run("nbdcopy", [uriOf(disk), target]);
  return target;
}

/** Numbers of the clusters that changed since the base, by nbdinfo. */
export async function dirtyClusters(disk: FrozenDisk): Promise<Set<number>> {
  const { stdout } = await run("nbdinfo", [`--map=${disk.dirtyContext ?? ""}`, "--json", uriOf(disk)]);
  const clusters = new Set<number>();
  for (const { offset, length, type } of JSON.parse(stdout) as {
    offset: number;
    length: number;
    type: number;
  }[]) {
    if ((type & 1) === 0) continue;
    for (let at = offset; at < offset + length; at += CLUSTER) clusters.add(Math.floor(at / CLUSTER));
  }
  return clusters;
}

/** What of ours is in QEMU: empty lists when a teardown was complete. */
export interface Residue {
  readonly nodes: readonly string[];
  readonly jobs: readonly string[];
  readonly exports: readonly string[];
  readonly transient: readonly string[];
  readonly checkpoints: readonly string[];
}

export const NOTHING: Residue = { nodes: [], jobs: [], exports: [], transient: [], checkpoints: [] };

export async function residueOf(monitor: TestMonitor): Promise<Residue> {
  const nodes =
    await monitor.execute<{ "node-name": string; "dirty-bitmaps"?: { name?: string }[] }[]>(
      "query-named-block-nodes",
    );
  const jobs = await monitor.execute<{ id: string }[]>("query-jobs");
  const exports = await monitor.execute<{ id: string }[]>("query-block-exports");
  const bitmaps = nodes.flatMap((node) => node["dirty-bitmaps"] ?? []).map(({ name }) => name ?? "");
  return {
    nodes: nodes.map((node) => node["node-name"]).filter((name) => name.startsWith("tm-")),
    jobs: jobs.map(({ id }) => id),
    exports: exports.map(({ id }) => id),
    transient: bitmaps.filter((name) => name.startsWith("tm-")),
    checkpoints: bitmaps.filter((name) => parseBitmapName(name) !== undefined).sort(),
  };
}

/** Files of ours below a directory: scratch, socket directories, state files. */
export async function filesOfOurs(...directories: readonly string[]): Promise<string[]> {
  const lists = await Promise.all(directories.map((directory) => readdir(directory, { recursive: true })));
  return lists.flat().filter((name) => /(^|\/)tm-|\.json/.test(name));
}
