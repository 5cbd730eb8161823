import { createHash, randomBytes } from "node:crypto";
import { readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { judgeOnThisHost, thisProcess, type ProcessIdentity } from "../../process/index.js";

const SUFFIX = "tidemark-partial";

/**
 * A name for the unfinished file of a target, which says whose it is: `.<target>.<host>-<pid>-<start time>-<random>.
 * tidemark-partial`; "host" stands for the boot and the pid namespace that the pid belongs to.
 */
export async function partialName(target: string): Promise<string> {
  const here = await thisProcess();
  const { pid, startTime } = here;
  const owner = [hostOf(here), pid, startTime ?? "unknown", randomBytes(4).toString("hex")].join("-");
  return `.${target}.${owner}.${SUFFIX}`;
}

/**
 * Removes what restores to the same target left that were killed. Those of another host, or from before a restart of
 * this one, stay: whoever writes them may be alive.
 */
export async function removeAbandoned(directory: string, target: string): Promise<void> {
  const here = await thisProcess();
  const prefix = `.${target}.${hostOf(here)}-`;
  for (const name of await readdir(directory)) {
    if (!name.startsWith(prefix)) continue;
    const [, pid, startTime] =
      /^(\d+)-(\d+)-[0-9a-f]{8}\.tidemark-partial$/.exec(name.slice(prefix.length)) ?? [];
    if (pid === undefined || startTime === undefined) continue;
    const owner: ProcessIdentity = { ...here, pid: Number(pid), startTime };
    if ((await judgeOnThisHost(owner, here)) === "gone") await rm(join(directory, name), { force: true });
  }
}

function hostOf({ bootId, pidNamespace }: ProcessIdentity): string {
  const text = `${bootId ?? randomBytes(16).toString("hex")} ${pidNamespace ?? ""}`;
  return createHash("sha256").update(text).digest("hex").slice(0, 8);
}
