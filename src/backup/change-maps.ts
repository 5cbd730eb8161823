import { MiB } from "../bytes/index.js";
import { chop, endOf, normalize, totalLength, type Extent } from "../extent/index.js";
import type { FrozenDisk } from "../machine/index.js";
import { NBD_STATE_DIRTY, QEMU_ALLOCATION_DEPTH } from "../nbd/index.js";
import type { ReplacementOptions } from "../transfer/index.js";
import type { DiskPlan } from "./disk-plan.js";
import { MapConnection } from "./map-connection.js";

/** Bytes that are counted at a time. */
const COUNTED = 4096 * MiB;

/**
 * What changed on a frozen disk since its base: what the bitmap recorded; what lies beyond the parent's end, since
 * growing a disk marks nothing; and what images hold that somebody put on top of the one with the bitmap.
 */
export class ChangeMaps {
  readonly #frozen: FrozenDisk;
  readonly #parentVirtualSize: number;
  readonly #bitmap: MapConnection;
  /** Which image holds what; undefined when the bitmap is the disk's own image's. */
  readonly #depth: MapConnection | undefined;

  private constructor(
    frozen: FrozenDisk,
    parentVirtualSize: number,
    bitmap: MapConnection,
    depth: MapConnection | undefined,
  ) {
    this.#frozen = frozen;
    this.#parentVirtualSize = parentVirtualSize;
    this.#bitmap = bitmap;
    this.#depth = depth;
  }

  /** Connects; nothing is said on the connections yet. @returns undefined for a full */
  static async open(
    frozen: FrozenDisk,
    { base, name }: DiskPlan,
    options: ReplacementOptions,
  ): Promise<ChangeMaps | undefined> {
    const { socket: address, exportName, dirtyContext, overlayDepth } = frozen;
    if (dirtyContext === undefined || base === undefined) return undefined;
    const place = { address, exportName, disk: name };
    const bitmap = await MapConnection.open({ ...place, context: dirtyContext }, options);
    if (overlayDepth === undefined) return new ChangeMaps(frozen, base.parentVirtualSize, bitmap, undefined);
    try {
      const depth = await MapConnection.open({ ...place, context: QEMU_ALLOCATION_DEPTH }, options);
      return new ChangeMaps(frozen, base.parentVirtualSize, bitmap, depth);
    } catch (error) {
      bitmap.close();
      throw error;
    }
  }

  get fileDescriptors(): readonly number[] {
    return [this.#bitmap, this.#depth].flatMap((connection) => connection?.fileDescriptors ?? []);
  }

  async greet(): Promise<void> {
    await this.#bitmap.greet();
    await this.#depth?.greet();
  }

  /** What changed in a range. */
  async extents(range: Extent): Promise<Extent[]> {
    const grown = Math.max(range.offset, this.#parentVirtualSize);
    return normalize([
      ...(await this.#marked(range)),
      { offset: grown, length: Math.max(0, endOf(range) - grown) },
    ]);
  }

  /** Bytes that QEMU shows as changed, on the whole disk. */
  async dirtyBytes(): Promise<number> {
    let bytes = 0;
    for (const range of chop([{ offset: 0, length: this.#frozen.virtualSize }], COUNTED)) {
      bytes += totalLength(await this.#marked(range));
    }
    return bytes;
  }

  close(): void {
    this.#bitmap.close();
    this.#depth?.close();
  }

  async #marked(range: Extent): Promise<Extent[]> {
    const recorded = await this.#bitmap.extents(range, NBD_STATE_DIRTY);
    const { overlayDepth = 0 } = this.#frozen;
    const held = await this.#depth?.extents(range, (depth) => depth >= 1 && depth <= overlayDepth);
    return normalize([...recorded, ...(held ?? [])]);
  }
}
