import { endOf, normalize, totalLength, type Extent } from "../extent/index.js";
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
import type { DiskPlan } from "./disk-plan.js";
import type { RangeFacts } from "./plan.js";

/**
 * One connection, for one map: QEMU answers for every context of a connection at each request. Requests are not
 * aborted: that would mean to disconnect, which is for after the exports are gone.
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
    if (this.#client === undefined) throw new RangeError("map asked before negotiation");
    const found: Extent[] = [];
    for await (const { offset, length, flags } of this.#client.map(this.#context, range)) {
      if ((flags & flag) !== 0) found.push({ offset, length });
    }
    return found;
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
    const allocation = new MapConnection(await openSocket(frozen.socket, { signal }), BASE_ALLOCATION);
    try {
      const { dirtyContext } = frozen;
      const dirty =
        dirtyContext === undefined
          ? undefined
          : new MapConnection(await openSocket(frozen.socket, { signal }), dirtyContext);
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
    return totalLength(await this.#dirty.extents(whole, NBD_STATE_DIRTY));
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

  /** What the bitmap says, and all that lies beyond the parent's end: growing a disk marks nothing. */
  async #dirtyExtents(range: Extent): Promise<Extent[] | undefined> {
    const { base } = this.#plan;
    if (this.#dirty === undefined || base === undefined) return undefined;
    const dirty = await this.#dirty.extents(range, NBD_STATE_DIRTY);
    const grown = Math.max(range.offset, base.parentVirtualSize);
    return normalize([...dirty, { offset: grown, length: Math.max(0, endOf(range) - grown) }]);
  }

  /** Where the parent's chain holds data among extents in which the frozen disk reads as zero. */
  async #parentData(zero: readonly Extent[]): Promise<Extent[]> {
    const { base } = this.#plan;
    if (base === undefined) return [];
    const { chain } = base.chain;
    const data: Extent[] = [];
    for (const extent of zero) {
      const length = Math.min(endOf(extent), chain.virtualSize) - extent.offset;
      if (length <= 0) break;
      for await (const run of chain.map(extent.offset, length)) {
        if (run.kind !== "zero") data.push({ offset: run.offset, length: run.length });
      }
    }
    return normalize(data);
  }
}
