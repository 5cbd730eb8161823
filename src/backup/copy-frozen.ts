import { messageOf } from "../errors/index.js";
import { anySignal, Budget, RateLimit, step, unlessAborted } from "../flow/index.js";
import type { HashDamageError } from "../hashes/index.js";
import type { FrozenPoint } from "../machine/index.js";
import { Connections } from "./connections.js";
import { copyDisk, measureCopy, UNIT_BYTES, type CopyResources, type DiskCopy } from "./disk-copy.js";
import type { DiskMaps } from "./disk-maps.js";
import type { DiskPlan } from "./disk-plan.js";
import type { DiskWriter } from "./disk-writer.js";
import type { BackupObserver } from "./observer.js";
import type { DiskShape } from "./plan.js";
import type { CopiedDisk, PointImages } from "./point-images.js";

/** Units of work in flight, for each worker: one compressed while the next is read. */
const UNITS_PER_WORKER = 2;

/** How a frozen point is copied. */
export interface CopyOptions {
  readonly signal: AbortSignal;
  /** Worker threads. */
  readonly workers: number;
  /** zstd level, 1 to 19. */
  readonly level: number;
  /** Bytes a second. */
  readonly bandwidth: number;
  readonly observer: BackupObserver;
}

/**
 * Copies all disks of a frozen point, side by side, and releases the point, whatever happens: the guest is free
 * again when this returns or throws. An abort releases it at once, and only then waits for what is under way: a
 * repository that takes no bytes any more may stall that for ever.
 *
 * @throws the first error of any disk, or what made the frozen point fail
 */
export async function copyFrozen(
  frozen: FrozenPoint,
  plans: readonly DiskPlan[],
  images: PointImages,
  options: CopyOptions,
): Promise<CopiedDisk[]> {
  const signal = anySignal(options.signal, frozen.failed);
  let connections: Connections | undefined;
  let copying: Promise<CopiedDisk[]> | undefined;
  let outcome: { readonly copied: CopiedDisk[] } | { readonly error: unknown };
  try {
    connections = await Connections.open(frozen, plans, options.workers, signal);
    await step("connections open");
    await connections.protect();
    await step("connections held");
    await connections.greet(options.level);
    await step("negotiated");
    copying = copyAll(frozen, plans, images, connections, { ...options, signal });
    const copied = await unlessAborted(copying, signal);
    await step("all read");
    await frozen.assertIntact();
    outcome = { copied };
  } catch (error) {
    // What made the frozen point fail says more than what reading it met.
    outcome = { error: frozen.failed.aborted ? frozen.failed.reason : error };
  }
  connections?.retire();
  try {
    await frozen.release(async () => connections?.close());
  } catch (error) {
    if ("copied" in outcome) throw error;
    options.observer.warning?.(messageOf(error));
  } finally {
    // Whoever discards the images must be their only user; what failed is in the outcome.
    await copying?.catch(() => undefined);
  }
  if ("error" in outcome) throw outcome.error;
  return outcome.copied;
}

async function copyAll(
  frozen: FrozenPoint,
  plans: readonly DiskPlan[],
  images: PointImages,
  connections: Connections,
  options: CopyOptions,
): Promise<CopiedDisk[]> {
  // The first error is the cause; the other disks stop because of it.
  const stop = new AbortController();
  const resources: CopyResources = {
    reader: connections.reader,
    inFlight: new Budget(options.workers * UNITS_PER_WORKER * UNIT_BYTES),
    bandwidth: new RateLimit(options.bandwidth),
    signal: anySignal(options.signal, stop.signal),
  };
  const copying = plans.map(async (plan, index) => {
    const maps = connections.maps[index];
    const disk = frozen.disks[index];
    if (maps === undefined || disk === undefined)
      throw new RangeError(`disk "${plan.name}" is not connected`);
    try {
      const writer = await images.create(plan, { signal: options.signal });
      const shape = { virtualSize: disk.virtualSize, clusterSize: plan.clusterSize };
      return await copyOne({ plan, maps, writer, export: index, ...shape }, resources, options.observer);
    } catch (error) {
      stop.abort(error);
      throw error;
    }
  });
  const results = await Promise.allSettled(copying);
  stop.signal.throwIfAborted();
  return results.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
}

interface DiskJob extends DiskShape {
  readonly plan: DiskPlan;
  readonly maps: DiskMaps;
  readonly writer: DiskWriter;
  readonly export: number;
}

async function copyOne(
  job: DiskJob,
  resources: CopyResources,
  observer: BackupObserver,
): Promise<CopiedDisk> {
  const { plan, maps, writer } = job;
  const { signal } = resources;
  const total = await measureCopy({ ...job, facts: (range) => maps.measure(range) }, signal);
  // What the guest writes above a base on a backing image is read as well, once it is in the scratch.
  const onProgress = (done: number): void =>
    observer.progress?.({ disk: plan.name, done, total: Math.max(done, total) });
  onProgress(0);
  await copyDisk(
    {
      ...job,
      hashKey: plan.hashKey,
      storeZeroes: plan.base !== undefined,
      facts: (range) => maps.facts(range),
      expected: expectedBy(plan, signal, observer),
      onProgress,
    },
    resources,
  );
  return { plan, writer, dirtyBytes: await maps.dirtyBytes() };
}

/** What the parent holds, for a disk that is compared with it. */
function expectedBy(
  { base, name }: DiskPlan,
  signal: AbortSignal,
  observer: BackupObserver,
): DiskCopy["expected"] {
  const hashes = base?.hashes;
  if (hashes === undefined) return undefined;
  const onDamage = ({ message }: HashDamageError): void =>
    observer.warning?.(`Disk "${name}" is stored anew where hashes are damaged: ${message}`);
  return (first, count) => hashes.window(first, count, { signal, onDamage });
}
