import { availableParallelism } from "node:os";
import type { IoOptions } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import type { Extent } from "../extent/index.js";
import { RateLimit } from "../flow/index.js";
import type { PointChain, Repository } from "../repository/index.js";
import { FrameDecoder, streamChain } from "../transfer/index.js";
import {
  openTarget,
  prepareTarget,
  type PreparedTarget,
  type TargetFormat,
  type TargetPlace,
} from "./target/open.js";

/** One disk of a restore. */
export interface RestoreDisk {
  /** The disk's name in the point. */
  readonly name: string;
  readonly to: TargetPlace;
}

/** What to restore, and where to. */
export interface RestoreOptions extends IoOptions {
  readonly repository: Repository;
  readonly machine: string;
  /** Id of the point. */
  readonly point: string;
  readonly disks: readonly RestoreDisk[];
  /** Default raw. */
  readonly format?: TargetFormat | undefined;
  /** Only these bytes of the disk (raw only): the target holds nothing else. */
  readonly range?: Extent | undefined;
  /** Replace targets that exist and are not empty. */
  readonly force?: boolean | undefined;
  /** Worker threads; default one a core. */
  readonly workers?: number | undefined;
  /** Bytes of the disk a second; default no limit. */
  readonly bandwidth?: number | undefined;
  readonly observer?: RestoreObserver | undefined;
}

/** What a restore tells while it runs. */
export interface RestoreObserver {
  progress?(event: { readonly disk: string; readonly done: number; readonly total: number }): void;
}

/** What was restored. */
export interface RestoreResult {
  readonly machine: string;
  readonly point: string;
  readonly disks: readonly { readonly name: string; readonly target: string; readonly bytes: number }[];
}

/**
 * Restores disks of a point. Every target is checked before anything is written; a target appears under its name only
 * when it is whole.
 *
 * @throws {NotFoundError} when there is no such point or disk
 * @throws {UsageError} when a target may not be written
 * @throws {DamageError} when an image is not what was stored: names it and the points that need it; no target is left
 */
export async function restore(options: RestoreOptions): Promise<RestoreResult> {
  const { repository, machine, point, format = "raw", force = false, signal } = options;
  if (options.range !== undefined && format !== "raw")
    throw new UsageError("A range can only be restored as raw");
  const jobs: { readonly name: string; readonly chain: PointChain; readonly target: PreparedTarget }[] = [];
  const decoder = FrameDecoder.start(options.workers ?? availableParallelism());
  try {
    for (const { name, to } of options.disks) {
      const chain = await repository.openChain(machine, point, name, { signal });
      try {
        jobs.push({ name, chain, target: await prepareTarget(to, { format, force }) });
      } catch (error) {
        await chain.close();
        throw error;
      }
    }
    const disks = [];
    for (const { name, chain, target } of jobs) {
      const bytes = await restoreDisk(name, chain, target, decoder, options);
      disks.push({ name, target: target.name, bytes });
    }
    return { machine, point, disks };
  } finally {
    await Promise.all(jobs.map(({ chain }) => chain.close()));
    await decoder.stop();
  }
}

/** @returns bytes of the target */
async function restoreDisk(
  name: string,
  opened: PointChain,
  prepared: PreparedTarget,
  decoder: FrameDecoder,
  options: RestoreOptions,
): Promise<number> {
  const { signal, observer, bandwidth = Infinity } = options;
  const { chain } = opened;
  const range = options.range ?? { offset: 0, length: chain.virtualSize };
  if (range.offset + range.length > chain.virtualSize) {
    throw new UsageError(
      `Cannot restore ${range.length} bytes at ${range.offset} of disk "${name}": it has ${chain.virtualSize} bytes`,
    );
  }
  const rate = new RateLimit(bandwidth);
  const target = await openTarget(prepared, range.length);
  try {
    for await (const { offset, length, bytes } of streamChain(chain, range, decoder, { signal })) {
      signal?.throwIfAborted();
      if (bytes !== undefined) await rate.pass(length, { signal });
      const at = offset - range.offset;
      await target.write({ offset: at, length, bytes }, { signal });
      observer?.progress?.({ disk: name, done: at + length, total: range.length });
    }
    await target.commit();
  } catch (error) {
    await target.abort();
    throw await opened.explain(error);
  }
  return range.length;
}
