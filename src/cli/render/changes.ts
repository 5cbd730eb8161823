import { formatSize } from "../../bytes/index.js";
import type { ChainChanges } from "../../rewrite/index.js";

/** What was done to a chain, or would be, in sentences. @param isListing say which points go */
export function renderChanges(changes: ChainChanges, machine: string, isListing = true): string {
  const { dryRun, removed, rewritten, freedBytes } = changes;
  const lines = rewritten.map(({ id, disk, copiedBytes, baseBytes }) => {
    const verb = dryRun ? "would be written anew" : "written anew";
    const base = baseBytes === 0 ? "" : ` to ${formatSize(baseBytes)} that stay together`;
    return `${machine}@${id} ${disk}: ${verb}, ${formatSize(copiedBytes)} moved${base}`;
  });
  for (const id of isListing ? removed : [])
    lines.push(`${machine}@${id}: ${dryRun ? "would be " : ""}${verdictOf(changes, id)}`);
  if (rewritten.length + removed.length === 0) lines.push(`${machine}: nothing to do`);
  else lines.push(renderFreed(machine, freedBytes, dryRun));
  return `${lines.join("\n")}\n`;
}

/** What becomes of a point that goes. */
function verdictOf({ forgotten }: ChainChanges, id: string): string {
  return forgotten.includes(id) ? "forgotten, its images stay for others" : "removed";
}

function renderFreed(machine: string, bytes: number, dryRun: boolean): string {
  const what = bytes < 0 ? "more" : "less";
  return `${machine}: ${formatSize(Math.abs(bytes))} ${what} ${dryRun ? "would be" : "are"} stored`;
}
