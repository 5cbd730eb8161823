import type { IoOptions } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
import { FencedError, type PointChain, type Repository } from "../repository/index.js";
import type { Movement } from "./movement.js";
import type { ImageMerge } from "./plan.js";

/** What writing images anew needs. */
export interface RewriteContext extends IoOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  /** Throws when the machine's lock is this run's no more. */
  readonly fence: () => Promise<void>;
  /** zstd level for the few clusters that no image has as they must be. */
  readonly level: number;
  /** Told, and asked, what may be moved. */
  readonly movement?: Movement | undefined;
}

/** What was moved for one image. */
export interface RewrittenImage {
  readonly id: string;
  readonly disk: string;
  /** Bytes of frames that were copied one by one. */
  readonly copiedBytes: number;
  /** Bytes of the new image, without those of the one that it began as a copy of. */
  readonly writtenBytes: number;
  /** Bytes of the one that it began as a copy of: not moved where the file system shares blocks, else copied; 0 for none. */
  readonly baseBytes: number;
}

/**
 * Opens the images of a merge, and the one that stays right below them: no others, so that a merge costs the same
 * however long the chain is.
 *
 * @throws {DamageError} when one of them, or what `work` reads of them, is damaged; with a hint
 */
export async function openStack<T>(
  merge: ImageMerge,
  { repository, machine, signal }: RewriteContext,
  work: (chain: PointChain) => Promise<T>,
): Promise<T> {
  let chain: PointChain | undefined;
  try {
    const depth = merge.stack.length + 1;
    chain = await repository.openChain(machine, merge.point, merge.disk, { depth, signal });
    requireStack(chain, merge);
    return await work(chain);
  } catch (error) {
    throw advised((await chain?.explain(error)) ?? error, machine);
  } finally {
    await chain?.close();
  }
}

/**
 * Images that were merged or taken away since the plan was made would be merged wrongly. A dry run, which has no lock, may
 * see that.
 */
function requireStack(chain: PointChain, { stack, parent }: ImageMerge): void {
  const found = chain.images.map(({ point }) => point.id);
  const expected = parent === null ? stack : [...stack, parent];
  if (found.join() !== expected.join()) {
    const what = `it is ${found.join(", ")}, not ${expected.join(", ")}`;
    throw new FencedError(
      `Cannot merge images of disk "${chain.disk.name}": its chain was changed, ${what}`,
      {
        hint: "Another run works on this machine's points: try again when it has ended",
      },
    );
  }
}

/** Tells whoever meets a damage what can be done: as long as a point needs what is lost, nothing can be merged with it. */
function advised(error: unknown, machine: string): unknown {
  if (!(error instanceof DamageError) || error.hint !== undefined) return error;
  const lost = [...(error.damage.points ?? [])].sort();
  const [oldest] = lost;
  if (oldest === undefined) return error;
  const those = lost.length === 1 ? "the point that is lost" : `the ${lost.length} points that are lost`;
  const hint =
    `Bring the file back from a copy, or remove ${those} with it: tidemark delete ${machine}@${oldest} --children; ` +
    `tidemark verify ${machine} tells all that is damaged`;
  return new DamageError(error.code, error.message, error.damage, { cause: error, hint });
}
