import type { FrozenPoint } from "../machine/index.js";
import { FrameReader } from "../transfer/index.js";
import { DiskMaps } from "./disk-maps.js";
import type { DiskPlan } from "./disk-plan.js";

/** How many NBD connections a backup opens in all. */
export function connectionCount(plans: readonly DiskPlan[], workers: number): number {
  const maps = plans.reduce((sum, { base }) => sum + (base === undefined ? 1 : 2), 0);
  return maps + plans.length * workers;
}

/**
 * All NBD connections of a backup: two maps a disk, and every worker's own. They are all opened before any is
 * negotiated, so that duplicates can be handed to another process in between; they are closed only when QEMU
 * has deleted the exports.
 */
export class Connections {
  readonly maps: readonly DiskMaps[];
  readonly reader: FrameReader;

  private constructor(maps: readonly DiskMaps[], reader: FrameReader) {
    this.maps = maps;
    this.reader = reader;
  }

  /** Connects; nothing is said on any connection yet. */
  static async open(
    frozen: FrozenPoint,
    plans: readonly DiskPlan[],
    workers: number,
    signal: AbortSignal,
  ): Promise<Connections> {
    const maps: DiskMaps[] = [];
    try {
      for (const [index, plan] of plans.entries()) {
        const disk = frozen.disks[index];
        if (disk === undefined) throw new RangeError(`disk "${plan.name}" was not frozen`);
        maps.push(await DiskMaps.open(disk, plan, signal));
      }
      const exports = frozen.disks.map(({ socket, exportName }) => ({ address: socket, exportName }));
      return new Connections(maps, await FrameReader.start(exports, workers));
    } catch (error) {
      for (const map of maps) map.close();
      throw error;
    }
  }

  /** The descriptors of all connections, for whoever is to hold duplicates. */
  get fileDescriptors(): readonly number[] {
    return [...this.maps.flatMap((map) => map.fileDescriptors), ...this.reader.fileDescriptors];
  }

  /** Negotiates all of them. */
  async greet(level: number): Promise<void> {
    await this.reader.greet(level);
    for (const map of this.maps) await map.greet();
  }

  async close(): Promise<void> {
    for (const map of this.maps) map.close();
    await this.reader.close();
  }
}
