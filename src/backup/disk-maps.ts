import { roundDown } from "../bytes/index.js";
import { DamageError } from "../errors/index.js";
import { endOf, normalize, subtract, union, widen, type Extent } from "../extent/index.js";
import type { FrozenDisk } from "../machine/index.js";
import {
  BASE_ALLOCATION,
  NBD_STATE_DIRTY,
  NBD_STATE_ZERO,
  negotiate,
  openSocket,
  type NbdClient,
  type NbdSocket,
} from "../nbd/index.js";
import type { Base, DiskPlan } from "./disk-plan.js";
import { planningRanges, type RangeFacts } from "./plan.js";

/**
 * One connection, for one map: QEMU answers for every context of a connection at each request. Requests are not
 * aborted: that would mean to disconnect, which is for after the exports are gone. For the same reason it is held.
 */
class MapConnection {
  readonly #socket: NbdSocket;
  readonly #context: string;
  #client: NbdClient | undefined;

  constructor(socket: NbdSocket, context: string) {
    this.#socket = socket;
    this.#context = context;
  }

  get fileDescriptor(): number | undefined {
    return this.#socket.fd;
  }

  async greet(exportName: string): Promise<void> {
    this.#client = await negotiate(this.#socket, { exportName, contexts: [this.#context] });
  }

  /** The extents of a range whose flags have `flag`. */
  async extents(range: Extent, flag: number): Promise<Extent[]> {
    const found: Extent[] = [];
    for await (const extent of this.runs(range, flag)) found.push(extent);
    return found;
  }

  /** As `extents`, one after the other: a large disk has millions. */
  async *runs(range: Extent, flag: number): AsyncGenerator<Extent> {
    if (this.#client === undefined) throw new RangeError("map asked before negotiation");
    for await (const { offset, length, flags } of this.#client.map(this.#context, range)) {
      if ((flags & flag) !== 0) yield { offset, length };
    }
  }

  /** The disk's bytes in a range, for small reads. */
  async read({ offset, length }: Extent): Promise<Buffer> {
    if (this.#client === undefined) throw new RangeError("disk read before negotiation");
    const bytes = Buffer.alloc(length);
    await this.#client.read(offset, bytes);
    return bytes;
  }

  close(): void {
    this.#client?.destroy();
    this.#socket.destroy();
  }
}

/** The maps of one frozen disk, and the tables of its parent: what a backup plans by. */
export class DiskMaps {
  readonly #frozen: FrozenDisk;
  readonly #plan: DiskPlan;
  readonly #allocation: MapConnection;
  readonly #dirty: MapConnection | undefined;
  #isBitmapComplete: Promise<boolean> | undefined;

  private constructor(
    frozen: FrozenDisk,
    plan: DiskPlan,
    allocation: MapConnection,
    dirty: MapConnection | undefined,
  ) {
    this.#frozen = frozen;
    this.#plan = plan;
    this.#allocation = allocation;
    this.#dirty = dirty;
  }

  /** Connects; nothing is said on the connections yet. */
  static async open(frozen: FrozenDisk, plan: DiskPlan, signal: AbortSignal): Promise<DiskMaps> {
    const allocation = new MapConnection(
      await openSocket(frozen.socket, { hold: true, signal }),
      BASE_ALLOCATION,
    );
    try {
      const { dirtyContext } = frozen;
      const dirty =
        dirtyContext === undefined
          ? undefined
          : new MapConnection(await openSocket(frozen.socket, { hold: true, signal }), dirtyContext);
      return new DiskMaps(frozen, plan, allocation, dirty);
    } catch (error) {
      allocation.close();
      throw error;
    }
  }

  get fileDescriptors(): readonly number[] {
    return [this.#allocation, this.#dirty].flatMap((connection) => connection?.fileDescriptor ?? []);
  }

  async greet(): Promise<void> {
    await this.#allocation.greet(this.#frozen.exportName);
    await this.#dirty?.greet(this.#frozen.exportName);
  }

  /** Bytes that the bitmap shows as changed since the base; null in a full. */
  async dirtyBytes(): Promise<number | null> {
    if (this.#dirty === undefined) return null;
    const whole = { offset: 0, length: this.#frozen.virtualSize };
    let bytes = 0;
    for await (const { length } of this.#dirty.runs(whole, NBD_STATE_DIRTY)) bytes += length;
    return bytes;
  }

  /** What a plan needs of a range but the parent's data: enough to tell what will be read. */
  async measure(range: Extent): Promise<RangeFacts> {
    const zero = await this.#allocation.extents(range, NBD_STATE_ZERO);
    return { dirty: await this.#dirtyExtents(range), zero, parentData: [] };
  }

  /** All that a plan needs of a range. */
  async facts(range: Extent): Promise<RangeFacts> {
    const facts = await this.measure(range);
    return { ...facts, parentData: await this.#parentData(facts.zero) };
  }

  close(): void {
    this.#allocation.close();
    this.#dirty?.close();
  }

  /** What is to be stored anew: what changed, or everything where that is not known. Undefined in a full. */
  async #dirtyExtents(range: Extent): Promise<Extent[] | undefined> {
    const { base } = this.#plan;
    if (this.#dirty === undefined || base === undefined) return undefined;
    this.#isBitmapComplete ??= this.#askWitness(this.#dirty, base);
    return (await this.#isBitmapComplete) ? await recordedExtents(this.#dirty, base, range) : [range];
  }

  /**
   * Whether the bitmap has all that changed. It has not when the disk shrank and grew back: what was cut off
   * reads as zero and looks clean. The allocation map does not always show it either: QEMU remembers where a raw
   * file holds data, and does not forget it when the file is cut.
   *
   * One cluster tells: the last one that is clean by both maps and holds data in the parent. A cut before or
   * inside it changed it. Behind it everything is stored anew or was zero, and is zero after a cut.
   */
  async #askWitness(dirty: MapConnection, base: Base): Promise<boolean> {
    const { clusterSize } = this.#plan;
    const { virtualSize } = this.#frozen;
    for (const range of [...planningRanges({ virtualSize, clusterSize })].reverse()) {
      const changed = widen(await recordedExtents(dirty, base, range), clusterSize, virtualSize);
      const zero = normalize(await this.#allocation.extents(range, NBD_STATE_ZERO));
      const last = (await this.#parentData(subtract([range], union(changed, zero)))).at(-1);
      if (last === undefined) continue;
      const offset = roundDown(endOf(last) - 1, clusterSize);
      // All of it, what the map says is zero too: a cut inside it leaves zeroes at its end.
      const end = Math.min(offset + clusterSize, virtualSize, base.parentVirtualSize);
      return await this.#isAsInParent(base, { offset, length: end - offset });
    }
    return true;
  }

  async #isAsInParent({ chain }: Base, extent: Extent): Promise<boolean> {
    const now = await this.#allocation.read(extent);
    try {
      return now.equals(await chain.chain.read(extent.offset, extent.length));
    } catch (error) {
      // A damaged parent vouches for nothing: stored anew, the point does not need it.
      if (error instanceof DamageError) return false;
      throw error;
    }
  }

  /** Where the parent's chain holds data among sorted extents. */
  async #parentData(extents: readonly Extent[]): Promise<Extent[]> {
    const { base } = this.#plan;
    if (base === undefined) return [];
    const { chain } = base.chain;
    const data: Extent[] = [];
    for (const extent of extents) {
      const length = Math.min(endOf(extent), chain.virtualSize) - extent.offset;
      if (length <= 0) break;
      for await (const run of chain.map(extent.offset, length)) {
        if (run.kind !== "zero") data.push({ offset: run.offset, length: run.length });
      }
    }
    return normalize(data);
  }
}

/** What the bitmap says, and all that lies beyond the parent's end: growing a disk marks nothing. */
async function recordedExtents(dirty: MapConnection, base: Base, range: Extent): Promise<Extent[]> {
  const recorded = await dirty.extents(range, NBD_STATE_DIRTY);
  const grown = Math.max(range.offset, base.parentVirtualSize);
  return normalize([...recorded, { offset: grown, length: Math.max(0, endOf(range) - grown) }]);
}
