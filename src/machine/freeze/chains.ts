import type { IoOptions } from "../../bytes/index.js";
import { isBelowOverlays } from "../checkpoints/overlays.js";
import type { DiskNode } from "../discover/discover.js";
import { assertDisksUnchanged } from "../discover/readiness.js";
import type { FreezeRequest, MachineState } from "../source.js";

/** Asks anew for the disks that can be frozen, and for the machine's state. */
export type Look = (options: IoOptions) => Promise<{
  readonly disks: readonly DiskNode[];
  readonly state: MachineState;
}>;

/**
 * Asks whether below each disk whose base is on a backing image there are the images of the plan: by their number
 * what overlays hold is told from what they are on top of.
 *
 * @throws {MachineBusyError} naming the disk when somebody changed them
 */
export async function assertChainsUnchanged(
  request: FreezeRequest,
  look: Look,
  options: IoOptions,
): Promise<void> {
  const overlaid = request.disks.filter(isBelowOverlays);
  if (overlaid.length > 0) assertDisksUnchanged(overlaid, (await look(options)).disks);
}
