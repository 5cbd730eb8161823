import { formatSize } from "../bytes/index.js";
import type { PointManifest } from "../repository/index.js";
import type { DiskPlan } from "./disk-plan.js";

/**
 * What is odd about a point that is to be made, compared with the one before it: it may be meant, or a disk forgotten, or
 * the wrong file named. For people.
 */
export function oddities(plans: readonly DiskPlan[], before: PointManifest | undefined): string[] {
  const found: string[] = [];
  const here = new Set(plans.flatMap(({ name, token }) => [name, token]));
  // A point that lacks a disk is easily taken for a whole one.
  const missing = before?.disks.filter(({ name, token }) => !here.has(name) && !here.has(token)) ?? [];
  if (missing.length > 0) {
    const names = missing.map(({ name }) => `"${name}"`).join(", ");
    found.push(`This point lacks ${names}, which the point before it has`);
  }
  for (const { name, token, disk } of plans) {
    const had = before?.disks.find((item) => item.token === token || item.name === name)?.virtualSize ?? 0;
    if (disk.virtualSize >= had) continue;
    const [is, was] = [disk.virtualSize, had].map(formatSize);
    found.push(
      `Disk "${name}" has shrunk to ${is ?? ""} from the ${was ?? ""} of the point before: is it the right one?`,
    );
  }
  return found;
}
