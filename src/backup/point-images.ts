import type { IoOptions } from "../bytes/index.js";
import type { ImageWriter } from "../qcow2/index.js";
import type { Repository } from "../repository/index.js";
import type { DiskPlan } from "./disk-plan.js";
import type { StoredDisk } from "./manifest.js";

/** A disk whose content is read; its image is not finished. */
export interface CopiedDisk {
  readonly plan: DiskPlan;
  readonly writer: ImageWriter;
  readonly dirtyBytes: number | null;
}

/** The images of a point in the making. */
export class PointImages {
  readonly #repository: Repository;
  readonly #machine: string;
  readonly #point: string;
  readonly #writers: ImageWriter[] = [];

  constructor(repository: Repository, machine: string, point: string) {
    this.#repository = repository;
    this.#machine = machine;
    this.#point = point;
  }

  /** Begins the image of a disk. */
  async create({ name, token, disk, clusterSize, base }: DiskPlan, io: IoOptions): Promise<ImageWriter> {
    const writer = await this.#repository.createImage(
      {
        ...{ machine: this.#machine, point: this.#point, disk: name, token },
        ...{ virtualSize: disk.virtualSize, clusterSize },
        parent: base === undefined ? undefined : { point: base.checkpoint, image: base.chain.disk.image },
      },
      io,
    );
    this.#writers.push(writer);
    return writer;
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
