import type { IoOptions } from "../bytes/index.js";
import type { Repository } from "../repository/index.js";
import type { DiskPlan } from "./disk-plan.js";
import { DiskWriter } from "./disk-writer.js";
import type { StoredDisk } from "./manifest.js";

/** A disk whose content is read; its image is not finished. */
export interface CopiedDisk {
  readonly plan: DiskPlan;
  readonly writer: DiskWriter;
  readonly dirtyBytes: number | null;
}

/** The images of a point in the making, and their hashes. */
export class PointImages {
  readonly #repository: Repository;
  readonly #machine: string;
  readonly #point: string;
  readonly #writers: { abort(): Promise<void> }[] = [];

  constructor(repository: Repository, machine: string, point: string) {
    this.#repository = repository;
    this.#machine = machine;
    this.#point = point;
  }

  /** Begins the files of a disk. */
  async create(plan: DiskPlan, io: IoOptions): Promise<DiskWriter> {
    const { name, token, disk, clusterSize, base, hashKey } = plan;
    const image = {
      ...{ machine: this.#machine, point: this.#point, disk: name, token },
      ...{ virtualSize: disk.virtualSize, clusterSize },
      parent: base === undefined ? undefined : { point: base.checkpoint, image: base.chain.disk.image },
    };
    const writer = await this.#repository.createImage(image, io);
    this.#writers.push(writer);
    if (hashKey === undefined) return new DiskWriter(writer, undefined);
    const hashes = await this.#repository.createHashes(image, hashKey, io);
    this.#writers.push(hashes);
    return new DiskWriter(writer, hashes);
  }

  /** Finishes all images. */
  async finish(copied: readonly CopiedDisk[]): Promise<StoredDisk[]> {
    const stored: StoredDisk[] = [];
    for (const { plan, writer, dirtyBytes } of copied) {
      stored.push({ plan, dirtyBytes, summary: await writer.finish() });
    }
    return stored;
  }

  /** Removes what was written. */
  async discard(): Promise<void> {
    for (const writer of this.#writers) await writer.abort();
    await this.#repository.discardPoint(this.#machine, this.#point);
  }
}
