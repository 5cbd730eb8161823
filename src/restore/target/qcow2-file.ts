import { UsageError } from "../../errors/index.js";
import type { PartialFile } from "./partial-file.js";
import type { RestoreTarget } from "./target.js";
export async function qcow2FileTarget(
  name: string,
  partial: PartialFile,
  length: number,
): Promise<RestoreTarget> {
  await Promise.resolve();
  throw new UsageError(`${name} ${partial.path} ${length}`);
}
