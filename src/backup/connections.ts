import { anySignal } from "../flow/index.js";
import type { FrozenPoint } from "../machine/index.js";
import { FrameReader, MOST_REPLACEMENTS, type ReplacementOptions } from "../transfer/index.js";
import { DiskMaps } from "./disk-maps.js";
import type { DiskPlan } from "./disk-plan.js";

/** How many NBD connections a backup opens at most, replaced ones included: the server may not have seen their end. */
export function connectionCount(plans: readonly DiskPlan[], workers: number): number {
  const maps = plans.reduce(
    (sum, { base }) => sum + (base?.bitmap === undefined ? 1 : base.overlays === 0 ? 2 : 3),
    0,
  );
  return (maps + plans.length * workers) * (1 + MOST_REPLACEMENTS);
}

/**
 * All NBD connections of a backup: up to three maps a disk, and every worker's own. They are all opened before any is
 * negotiated, so that duplicates can be handed to another process in between; they are closed only when QEMU
 * has deleted the exports. One that drops is replaced, by the same rule.
 */
export class Connections {
  readonly #frozen: FrozenPoint;
  readonly #maps: DiskMaps[] = [];
  readonly #retired = new AbortController();
  #reader: FrameReader | undefined;
  #handedOver: Promise<void> = Promise.resolve();
  #nextHandOver: Promise<void> | undefined;

  private constructor(frozen: FrozenPoint) {
    this.#frozen = frozen;
  }

  /**
   * Connects; nothing is said on any connection yet.
   *
   * @param signal also ends the replacing of connections
   */
  static async open(
    frozen: FrozenPoint,
    plans: readonly DiskPlan[],
    workers: number,
    signal: AbortSignal,
  ): Promise<Connections> {
    const connections = new Connections(frozen);
    const options: ReplacementOptions = {
      protect: () => connections.protect(),
      signal: anySignal(signal, connections.#retired.signal),
    };
    try {
      const exports = [];
      for (const [index, plan] of plans.entries()) {
        const disk = frozen.disks[index];
        if (disk === undefined) throw new RangeError(`disk "${plan.name}" was not frozen`);
        connections.#maps.push(await DiskMaps.open(disk, plan, options));
        exports.push({ disk: plan.name, address: disk.socket, exportName: disk.exportName });
      }
      connections.#reader = await FrameReader.start(exports, workers, options);
      return connections;
    } catch (error) {
      for (const map of connections.#maps) map.close();
      throw error;
    }
  }

  /** By disk, in the order of the plans. */
  get maps(): readonly DiskMaps[] {
    return this.#maps;
  }

  get reader(): FrameReader {
    if (this.#reader === undefined) throw new RangeError("connections used before they were opened");
    return this.#reader;
  }

  /**
   * Has duplicates of all connections held, as they are now. One hand-over at a time: each hands over all that there
   * is, so none may overtake a later one, and who comes meanwhile shares the next.
   */
  protect(): Promise<void> {
    this.#nextHandOver ??= this.#handedOver.then(() => {
      this.#nextHandOver = undefined;
      const handingOver = this.#handOver();
      this.#handedOver = handingOver.catch(() => undefined);
      return handingOver;
    });
    return this.#nextHandOver;
  }

  /** Negotiates all of them. */
  async greet(level: number): Promise<void> {
    await this.reader.greet(level);
    for (const map of this.#maps) await map.greet();
  }

  /** Replaces none any more: the exports are about to go. */
  retire(): void {
    this.#retired.abort();
  }

  async close(): Promise<void> {
    for (const map of this.#maps) map.close();
    await this.#reader?.close();
  }

  async #handOver(): Promise<void> {
    const ofMaps = this.#maps.flatMap((map) => map.fileDescriptors);
    await this.#frozen.protect([...ofMaps, ...(await this.reader.fileDescriptors())]);
  }
}
