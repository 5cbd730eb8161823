import { endOf, normalize, type Extent } from "../extent/index.js";
import type { FrozenDisk } from "../machine/index.js";
import { BASE_ALLOCATION, NBD_STATE_ZERO } from "../nbd/index.js";
import type { ReplacementOptions } from "../transfer/index.js";
import { ChangeMaps } from "./change-maps.js";
import type { DiskPlan } from "./disk-plan.js";
import { MapConnection } from "./map-connection.js";
import type { RangeFacts } from "./plan.js";
import { isBitmapComplete } from "./witness.js";

/** The maps of one frozen disk, and the tables of its parent: what a backup plans by. */
export class DiskMaps {
  readonly #frozen: FrozenDisk;
  readonly #plan: DiskPlan;
  readonly #allocation: MapConnection;
  readonly #changes: ChangeMaps | undefined;
  #isBitmapComplete: Promise<boolean> | undefined;

  private constructor(
    frozen: FrozenDisk,
    plan: DiskPlan,
    allocation: MapConnection,
    changes: ChangeMaps | undefined,
  ) {
    this.#frozen = frozen;
    this.#plan = plan;
    this.#allocation = allocation;
    this.#changes = changes;
  }

  /** Connects; nothing is said on the connections yet. */
  static async open(frozen: FrozenDisk, plan: DiskPlan, options: ReplacementOptions): Promise<DiskMaps> {
    const { socket: address, exportName } = frozen;
    const place = { address, exportName, disk: plan.name };
    const allocation = await MapConnection.open({ ...place, context: BASE_ALLOCATION }, options);
    try {
      return new DiskMaps(frozen, plan, allocation, await ChangeMaps.open(frozen, plan, options));
    } catch (error) {
      allocation.close();
      throw error;
    }
  }

  get fileDescriptors(): readonly number[] {
    return [...this.#allocation.fileDescriptors, ...(this.#changes?.fileDescriptors ?? [])];
  }

  async greet(): Promise<void> {
    await this.#allocation.greet();
    await this.#changes?.greet();
  }

  /** Bytes that QEMU shows as changed since the base; null in a full. */
  async dirtyBytes(): Promise<number | null> {
    return this.#changes === undefined ? null : await this.#changes.dirtyBytes();
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
    this.#changes?.close();
  }

  /** What is to be stored anew: what changed, or everything where that is not known. Undefined in a full. */
  async #dirtyExtents(range: Extent): Promise<Extent[] | undefined> {
    const { base } = this.#plan;
    const changes = this.#changes;
    if (changes === undefined || base === undefined) return undefined;
    const recorded = (within: Extent): Promise<Extent[]> => changes.extents(within);
    this.#isBitmapComplete ??= isBitmapComplete({
      virtualSize: this.#frozen.virtualSize,
      clusterSize: this.#plan.clusterSize,
      parentVirtualSize: base.parentVirtualSize,
      recorded,
      zero: (within) => this.#allocation.extents(within, NBD_STATE_ZERO),
      parentData: (extents) => this.#parentData(extents),
      read: (extent) => this.#allocation.read(extent),
      readParent: ({ offset, length }) => base.chain.chain.read(offset, length),
    });
    return (await this.#isBitmapComplete) ? await recorded(range) : [range];
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
