import { uptime } from "node:os";
import { startTimeOf, type ProcessIdentity, type ProcessOnHost } from "./identity.js";

/**
 * What can be proven about a process from here.
 *
 * - "alive": it runs, however long it has given no sign of life: a suspended process goes on some day.
 * - "gone": it ended, or its host was started anew.
 * - "unknown": it runs elsewhere (or did), or the system does not tell; only its signs of life can say more.
 */
export type Liveness = "alive" | "gone" | "unknown";

/** Judges a process that is, or was, one of this host. */
export async function judgeOnThisHost(wanted: ProcessIdentity, here: ProcessIdentity): Promise<Liveness> {
  const { pid, startTime, bootId, pidNamespace } = wanted;
  if (bootId === null || here.bootId === null) return "unknown";
  if (bootId !== here.bootId) return "gone";
  if (pidNamespace === null || pidNamespace !== here.pidNamespace) return "unknown";
  if (!exists(pid)) return "gone";
  const found = await startTimeOf(pid);
  if (found === null || startTime === null) return exists(pid) ? "unknown" : "gone";
  return found === startTime ? "alive" : "gone";
}

/**
 * Judges a process of any host.
 *
 * @param lastSign when the process last gave a sign of life
 */
export async function judgeOnAnyHost(
  wanted: ProcessOnHost,
  here: ProcessOnHost,
  lastSign: Date,
): Promise<Liveness> {
  if (wanted.machineId === null || wanted.machineId !== here.machineId) return "unknown";
  if (wanted.bootId !== here.bootId) {
    // Cloned hosts and containers may share a machine id. It is this host, started anew, when the name is the same too,
    // and nothing was heard of the process since the start: a clone's process goes on giving signs of life.
    if (wanted.host !== here.host || lastSign.getTime() >= Date.now() - uptime() * 1000) return "unknown";
  }
  return await judgeOnThisHost(wanted, here);
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
