import type { IoOptions } from "../bytes/index.js";
import {
  bitmapsToRemoveAfter,
  catalogueOf,
  checkpointsOf,
  type FrozenPoint,
  type MachineIdentity,
  type RemovableBitmap,
} from "../machine/index.js";
import type { PointManifest, Repository } from "../repository/index.js";

/** Where a point was committed, and of which machine. */
export interface KeepContext {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  readonly identity: Pick<MachineIdentity, "uuid">;
}

/**
 * Leaves as many checkpoints on the frozen disks as the point says that was just committed, by the same rule as a
 * recovery, which does it later when this fails. What was transient goes in any case.
 *
 * @param points the machine's, the committed one among them
 */
export async function keepNewest(
  frozen: FrozenPoint,
  points: readonly PointManifest[],
  { repository, machine, identity }: KeepContext,
  io: IoOptions,
): Promise<void> {
  const checkpoints = checkpointsOf(repository, machine, io);
  const catalogue = catalogueOf(points, checkpoints.catalogue);
  const context = { ...checkpoints, catalogue, machineUuid: identity.uuid };
  const remove: RemovableBitmap[] = [];
  try {
    for (const disk of frozen.disks) remove.push(...(await bitmapsToRemoveAfter(disk, context)));
  } finally {
    await frozen.keep({ remove });
  }
}
