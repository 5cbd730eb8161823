import { availableParallelism } from "node:os";
import { isZero, type IoOptions } from "../bytes/index.js";
import { TidemarkError, UsageError } from "../errors/index.js";
import { endOf, type Extent } from "../extent/index.js";
import { RateLimit } from "../flow/index.js";
import { repositoryTag } from "../point/index.js";
import type { PointChain, Repository } from "../repository/index.js";
import { ObjectReplacedError } from "../storage/index.js";
import { FrameDecoder, STREAM_MEMORY, streamChain, type DiskPiece } from "../transfer/index.js";
import { prepareTarget, type TargetFormat, type TargetPlace } from "./target/open.js";
import type { PreparedTarget } from "./target/target.js";

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
  /** Write in place, and only what differs from what the target holds. */
  readonly onlyChanged?: boolean | undefined;
  /**
   * Leave the point's checkpoint in the restored qcow2 files: the next backup of a machine that runs on them is an increment
   * of this point, a branch.
   */
  readonly track?: boolean | undefined;
  /** The storage daemon's program, for existing qcow2 images; default the one in PATH. */
  readonly storageDaemon?: string | undefined;
  /** Worker threads; default one a core, at most 4. */
  readonly workers?: number | undefined;
  /** Bytes of the disk a second; default no limit. */
  readonly bandwidth?: number | undefined;
  readonly observer?: RestoreObserver | undefined;
}

/** What a restore tells while it runs. */
export interface RestoreObserver {
  progress?(event: { readonly disk: string; readonly done: number; readonly total: number }): void;
  /** Something that the operator should know. */
  warning?(message: string): void;
}

/** What was restored. */
export interface RestoreResult {
  readonly machine: string;
  readonly point: string;
  readonly disks: readonly RestoredDisk[];
}

/** A disk that was restored. */
export interface RestoredDisk {
  readonly name: string;
  readonly target: string;
  /** Bytes of the disk, or of the part of it, that the target now holds. */
  readonly bytes: number;
  /** Bytes that had to be written for that. */
  readonly writtenBytes: number;
}

/** Worker threads, unless more are asked for: so many decode what one thread can hand out. */
const MOST_WORKERS = 4;

/** One disk on its way. */
interface Job {
  readonly name: string;
  /** Another one when the chain was rewritten meanwhile. */
  opened: PointChain;
  readonly target: PreparedTarget;
}

/**
 * Restores disks of a point. Every target is checked before anything is written. A new file appears under its name
 * only when it is whole; what is written in place (a device, an NBD export, an existing image with `onlyChanged`)
 * holds a mixture until the restore is done.
 *
 * @throws {NotFoundError} when there is no such point or disk
 * @throws {UsageError} when a target may not be written, or is too small
 * @throws {DamageError} when an image is not what was stored: names it and the points that need it; no new file is left
 */
export async function restore(options: RestoreOptions): Promise<RestoreResult> {
  const { repository, machine, point, format = "raw", force = false, onlyChanged = false, signal } = options;
  if (options.range !== undefined && format !== "raw")
    throw new UsageError("A range can only be restored as raw");
  const isPart = options.range !== undefined;
  const { storageDaemon } = options;
  const repositoryId = repositoryTag(repository.id);
  const jobs: Job[] = [];
  const decoder = FrameDecoder.start(
    options.workers ?? Math.min(availableParallelism(), MOST_WORKERS),
    STREAM_MEMORY,
  );
  try {
    for (const { name, to } of options.disks) {
      const opened = await repository.openChain(machine, point, name, { signal, inOrder: true });
      try {
        const { token } = opened.disk;
        const checkpoint = { repository: repositoryId, checkpoint: point, token };
        const track = options.track === true ? checkpoint : undefined;
        const how = { format, force, onlyChanged, isPart, storageDaemon, track, signal };
        jobs.push({ name, opened, target: await prepareTarget(to, how) });
      } catch (error) {
        await opened.close();
        throw error;
      }
    }
    const disks: RestoredDisk[] = [];
    for (const job of jobs) disks.push(await restoreDisk(job, decoder, options));
    return { machine, point, disks };
  } finally {
    for (const job of jobs) {
      await job.target.dispose();
      await job.opened.close();
    }
    await decoder.stop();
  }
}

async function restoreDisk(job: Job, decoder: FrameDecoder, options: RestoreOptions): Promise<RestoredDisk> {
  const { name, target: prepared } = job;
  const { signal, observer, bandwidth = Infinity } = options;
  try {
    const range = await rangeOf(job, decoder, options);
    const rate = new RateLimit(bandwidth);
    const target = await prepared.begin(range.length);
    try {
      for await (const pieces of readDisk(job, range, decoder, options)) {
        for (const { offset, length, bytes } of pieces) {
          signal?.throwIfAborted();
          if (bytes !== undefined) await rate.pass(length, { signal });
          const at = offset - range.offset;
          await target.write({ offset: at, length, bytes }, { signal });
          observer?.progress?.({ disk: name, done: at + length, total: range.length });
        }
        // The memory of the pieces is used again from here on.
        await target.settle();
      }
      await target.commit();
    } catch (error) {
      await target.abort();
      if (prepared.isInPlace) observer?.warning?.(`${prepared.name} now holds a part of disk "${name}" only`);
      throw error;
    }
    return { name, target: prepared.name, bytes: range.length, writtenBytes: target.written };
  } catch (error) {
    throw await job.opened.explain(asTargetError(error, job));
  }
}

/** How often a chain is opened anew that is rewritten again and again, without coming forward. */
const ATTEMPTS = 8;

/** Streams a range of a disk; goes on where it was when the chain is rewritten meanwhile, which reads alike. */
async function* readDisk(
  job: Job,
  range: Extent,
  decoder: FrameDecoder,
  { repository, machine, point, signal }: RestoreOptions,
): AsyncGenerator<readonly DiskPiece[]> {
  const end = range.offset + range.length;
  for (let at = range.offset, failures = 0; ;) {
    try {
      const rest = { offset: at, length: end - at };
      for await (const pieces of streamChain(job.opened.chain, rest, decoder, { signal })) {
        yield pieces;
        at = endOf(pieces.at(-1) ?? { offset: at, length: 0 });
        failures = 0;
      }
      return;
    } catch (error) {
      if (!(error instanceof ObjectReplacedError) || failures === ATTEMPTS) throw error;
      failures += 1;
    }
    const old = job.opened;
    job.opened = await repository.openChain(machine, point, job.name, { signal, inOrder: true });
    await old.close();
  }
}

/** What the system says of a target, in our words. */
function asTargetError(error: unknown, { name, target }: Job): unknown {
  if (!(error instanceof Error) || error instanceof TidemarkError || !("syscall" in error)) return error;
  const isFull = "code" in error && ["ENOSPC", "EDQUOT", "EFBIG"].includes(String(error.code));
  return new TidemarkError("TM_TARGET", `Cannot restore disk "${name}" to ${target.name}: ${error.message}`, {
    cause: error,
    hint: isFull ? "Free space there, or choose another target" : undefined,
  });
}

/** The bytes of the disk that go to the target. @throws {UsageError} when they are not there, or do not fit */
async function rangeOf(
  { name, opened, target }: Job,
  decoder: FrameDecoder,
  { range, signal }: RestoreOptions,
): Promise<Extent> {
  const { chain } = opened;
  const size = chain.virtualSize;
  if (range !== undefined && range.offset + range.length > size) {
    throw new UsageError(
      `Cannot restore ${range.length} bytes at ${range.offset} of disk "${name}": it has ${size} bytes`,
    );
  }
  const { capacity = Infinity } = target;
  if (range !== undefined || capacity >= size) return range ?? { offset: 0, length: size };
  const beyond = { offset: capacity, length: size - capacity };
  for await (const pieces of streamChain(chain, beyond, decoder, { signal })) {
    const data = pieces.find(({ bytes }) => bytes !== undefined && !isZero(bytes));
    if (data === undefined) continue;
    throw new UsageError(
      `Cannot restore disk "${name}" to ${target.name}: it has ${capacity} bytes, the disk holds data beyond, at ${data.offset}`,
      { hint: `Use a target of at least ${size} bytes` },
    );
  }
  return { offset: 0, length: capacity };
}
