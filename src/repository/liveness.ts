import { readFile, readlink } from "node:fs/promises";
import { hostname } from "node:os";
import type { Holder } from "./holder.js";

/** What of a holder says where its process runs; null where the system does not tell. */
export type ProcessIdentity = Pick<
  Holder,
  "machineId" | "bootId" | "pidNamespace" | "pid" | "startTime" | "host"
>;

/** This process. */
export async function thisProcess(): Promise<ProcessIdentity> {
  const [machineId, bootId, pidNamespace, startTime] = await Promise.all([
    firstLine("/etc/machine-id"),
    firstLine("/proc/sys/kernel/random/boot_id"),
    readlink("/proc/self/ns/pid").catch(unknown),
    startTimeOf(process.pid),
  ]);
  return { machineId, bootId, pidNamespace, pid: process.pid, startTime, host: hostname() };
}

/**
 * What can be proven about a holder's process from here.
 *
 * - "alive": it runs on this host, however old its heartbeat is: a suspended process goes on some day.
 * - "gone": it ended, or its host was started anew.
 * - "unknown": it ran elsewhere, or the system does not tell; only its heartbeat can say more.
 */
export async function judge(
  holder: ProcessIdentity,
  here: ProcessIdentity,
): Promise<"alive" | "gone" | "unknown"> {
  const { machineId, bootId, pidNamespace, pid, startTime, host } = holder;
  if (machineId === null || bootId === null || machineId !== here.machineId) return "unknown";
  // Cloned hosts and containers may share a machine id; with the host's name it is one host, started anew.
  if (bootId !== here.bootId) return host === here.host ? "gone" : "unknown";
  if (pidNamespace === null || pidNamespace !== here.pidNamespace) return "unknown";
  if (!exists(pid)) return "gone";
  const found = await startTimeOf(pid);
  if (found === null || startTime === null) return exists(pid) ? "unknown" : "gone";
  return found === startTime ? "alive" : "gone";
}

function exists(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    // EPERM: it is there, and somebody else's.
    return !(error instanceof Error && "code" in error && error.code === "ESRCH");
  }
}

/**
 * Start time of a process: field 22 of /proc/<pid>/stat (proc(5)); null when the system does not tell.
 * A zombie has ended: it gets no start time that a living process could have.
 */
async function startTimeOf(pid: number): Promise<string | null> {
  const stat = await firstLine(`/proc/${pid}/stat`);
  // The second field, the command's name in parentheses, may hold anything.
  const fields = stat?.slice(stat.lastIndexOf(")") + 2).split(" ");
  const state = fields?.[0];
  return state === "Z" || state === "X" ? "ended" : (fields?.[19] ?? null);
}

async function firstLine(path: string): Promise<string | null> {
  const content = await readFile(path, "utf8").catch(unknown);
  return content?.split("\n")[0]?.trim() ?? null;
}

/** Systems without /proc do not tell: that is an answer here, not a failure. */
function unknown(): null {
  return null;
}
