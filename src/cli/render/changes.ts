import { formatSize } from "../../bytes/index.js";
import type { ChainChanges } from "../../rewrite/index.js";

/** What was done to a chain, or would be, in sentences. */
export function renderChanges({ dryRun, removed, rewritten }: ChainChanges, machine: string): string {
  const lines = rewritten.map(({ id, disk, copiedBytes }) => {
    const verb = dryRun ? "would be written anew" : "written anew";
    return `${machine}@${id} ${disk}: ${verb}, ${formatSize(copiedBytes)} moved`;
  });
  for (const id of removed) lines.push(`${machine}@${id}: ${dryRun ? "would be removed" : "removed"}`);
  if (lines.length === 0) lines.push(`${machine}: nothing to do`);
  return `${lines.join("\n")}\n`;
}
