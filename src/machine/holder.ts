import { readFile, readlink } from "node:fs/promises";

/** A process, told apart from any other that ever had its pid. */
export interface Holder {
  readonly pid: number;
  /** Clock ticks from boot to the process's start: field 22 of /proc/<pid>/stat. */
  readonly startTime: string;
  readonly bootId: string;
  /** Pids mean something only within their namespace: containers may share a run directory. */
  readonly pidNamespace: string;
}

/** What is known of a process: `unknown` when it belongs to another pid namespace. */
export type Liveness = "alive" | "dead" | "unknown";

/** This process. */
export async function thisProcess(): Promise<Holder> {
  const [startTime, bootId, pidNamespace] = await Promise.all([
    startTimeOf(process.pid),
    readBootId(),
    readlink("/proc/self/ns/pid"),
  ]);
  return { pid: process.pid, startTime: startTime ?? "", bootId, pidNamespace };
}

/** Whether the process still runs. A zombie does not: it holds nothing any more. */
export async function judgeHolder(holder: Holder): Promise<Liveness> {
  if (holder.bootId !== (await readBootId())) return "dead";
  if (holder.pidNamespace !== (await readlink("/proc/self/ns/pid"))) return "unknown";
  return (await startTimeOf(holder.pid)) === holder.startTime ? "alive" : "dead";
}

async function readBootId(): Promise<string> {
  return (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim();
}

/** proc(5): the second field of stat is the command in parentheses, which may hold blanks and parentheses. */
async function startTimeOf(pid: number): Promise<string | undefined> {
  let text: string;
  try {
    text = await readFile(`/proc/${pid}/stat`, "utf8");
  } catch (error) {
    // ESRCH: the process ended between open and read.
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ESRCH") return undefined;
    throw error;
  }
  const [state, ...fields] = text.slice(text.lastIndexOf(")") + 2).split(" ");
  return state === "Z" || state === "X" ? undefined : fields[18];
}
