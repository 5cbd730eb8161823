import { readdir, readFile, readlink } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import type { Rig } from "./rig.js";

/** Process ids of the guards that runs of a rig have, oldest first. */
export async function guardsOf(rig: Rig): Promise<number[]> {
  const home = `TIDEMARK_RUNTIME_DIR=${rig.directory.file("run")}`;
  const pids = (await readdir("/proc")).filter((name) => /^\d+$/.test(name)).map(Number);
  const found = await Promise.all(pids.map((pid) => isGuard(pid, home)));
  return pids.filter((_pid, index) => found[index]).sort((a, b) => a - b);
}

/** Waits until a rig has so many guards. @throws after 15 s */
export async function waitForGuards(rig: Rig, count: number): Promise<number[]> {
  const deadline = performance.now() + 15_000;
  // The kernel tells nobody about the end of another one's child.
  for (;;) {
    const guards = await guardsOf(rig);
    if (guards.length === count) return guards;
    if (performance.now() > deadline) throw new Error(`${guards.length} guards instead of ${count}`);
    await sleep(10);
  }
}

/** Number of sockets that a process has open. */
export async function socketsOf(pid: number): Promise<number> {
  const names = await readdir(`/proc/${pid}/fd`);
  const targets = await Promise.all(names.map((name) => readlink(`/proc/${pid}/fd/${name}`).catch(() => "")));
  return targets.filter((target) => target.startsWith("socket:")).length;
}

/** A zombie has neither arguments nor environment. */
async function isGuard(pid: number, home: string): Promise<boolean> {
  const read = (name: string): Promise<string> => readFile(`/proc/${pid}/${name}`, "utf8").catch(() => "");
  return (
    (await read("cmdline")).includes("/guard/entry.") && (await read("environ")).split("\0").includes(home)
  );
}
