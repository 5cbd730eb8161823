import { readFile, readlink } from "node:fs/promises";
import { hostname } from "node:os";

/** A process of one host, told apart from any other that ever had its pid. null where the system does not tell. */
export interface ProcessIdentity {
  readonly pid: number;
  /** Clock ticks from boot to the process's start. */
  readonly startTime: string | null;
  readonly bootId: string | null;
  /** Pids mean something only within their namespace: containers share files. */
  readonly pidNamespace: string | null;
}

/** A host, as far as hosts can be told apart. null where the system does not tell. */
export interface HostIdentity {
  readonly machineId: string | null;
  /** Its name. */
  readonly host: string;
}

/** A process of any host. */
export type ProcessOnHost = ProcessIdentity & HostIdentity;

/** This process. */
export async function thisProcess(): Promise<ProcessIdentity> {
  const [startTime, bootId, pidNamespace] = await Promise.all([
    startTimeOf(process.pid),
    firstLine("/proc/sys/kernel/random/boot_id"),
    readlink("/proc/self/ns/pid").catch(unknown),
  ]);
  return { pid: process.pid, startTime, bootId, pidNamespace };
}

/** This host. */
export async function thisHost(): Promise<HostIdentity> {
  return { machineId: await firstLine("/etc/machine-id"), host: hostname() };
}

/** Start time of a process that has ended: none that a living one could have. */
const ENDED = "ended";

/**
 * Start time of a process: field 22 of /proc/<pid>/stat (proc(5)); null when the system does not tell. A zombie
 * has ended: it holds nothing any more.
 */
export async function startTimeOf(pid: number): Promise<string | null> {
  const stat = await firstLine(`/proc/${pid}/stat`);
  // The second field, the command's name in parentheses, may hold anything.
  const fields = stat?.slice(stat.lastIndexOf(")") + 2).split(" ");
  const state = fields?.[0];
  return state === "Z" || state === "X" ? ENDED : (fields?.[19] ?? null);
}

async function firstLine(path: string): Promise<string | null> {
  const content = await readFile(path, "utf8").catch(unknown);
  return content?.split("\n")[0]?.trim() ?? null;
}

/** Systems without /proc do not tell: that is an answer here, not a failure. */
function unknown(): null {
  return null;
}
