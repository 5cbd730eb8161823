import { NotFoundError, UsageError } from "../errors/index.js";
import { selectPoint, type PointManifest, type Survey } from "../repository/index.js";

/** Most checkpoints that stay in a machine: each costs its guest's writes a little. */
export const MOST_CHECKPOINTS = 16;

/** What says from where a backup starts, and what it leaves in the machine. */
export interface CheckpointOptions {
  readonly machine: string;
  readonly full?: boolean | undefined;
  readonly since?: string | undefined;
  readonly keepCheckpoints?: number | undefined;
}

/** @throws {UsageError} for options that contradict each other or that cannot be */
export function requireSense({ full = false, since, keepCheckpoints = 1 }: CheckpointOptions): void {
  if (full && since !== undefined)
    throw new UsageError("A full backup starts from no point: --full or --since");
  if (Number.isInteger(keepCheckpoints) && keepCheckpoints >= 1 && keepCheckpoints <= MOST_CHECKPOINTS)
    return;
  throw new UsageError(`Cannot keep ${keepCheckpoints} checkpoints: 1 to ${MOST_CHECKPOINTS} can be kept`);
}

/**
 * The point that a differential starts from; undefined when none was asked for.
 *
 * @throws {NotFoundError} when there is none
 * @throws {DamageError} when it may be one that cannot be read
 */
export function sincePoint(
  { points, unreadable }: Survey,
  { since, machine }: CheckpointOptions,
): PointManifest | undefined {
  if (since === undefined) return undefined;
  try {
    const found = selectPoint(points, since, { machine });
    const newer = unreadable.find(({ id }) => id > found.id);
    if (since.startsWith("latest") && newer !== undefined) throw newer.error;
    return found;
  } catch (error) {
    const [suspect] = unreadable;
    throw error instanceof NotFoundError && suspect !== undefined ? suspect.error : error;
  }
}
