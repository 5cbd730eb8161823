import { cp } from "node:fs/promises";
import { expect } from "vitest";
import { parseBitmapName } from "../../src/point/index.js";
import { compareImages, toRaw } from "../support/image.js";
import type { MachineOptions } from "../support/qemu.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";
import { residueOf } from "../interop/machine-fixture.js";

const MiB = 1024 * 1024;

/** A machine with one qcow2 disk that only the test writes to, and every point that was made of it. */
export class Catalogued implements AsyncDisposable {
  readonly rig: Rig;
  readonly image: string;
  readonly #taken: { readonly point: PointView; readonly repository: string; readonly reference: string }[] =
    [];
  #writes = 0;

  private constructor(rig: Rig, image: string) {
    this.rig = rig;
    this.image = image;
  }

  static async begin(): Promise<Catalogued> {
    const rig = await Rig.create();
    try {
      const catalogued = new Catalogued(rig, await rig.image("a.qcow2", "qcow2", 4 * MiB));
      await catalogued.start();
      return catalogued;
    } catch (error) {
      await rig[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Starts a machine, by default the same one with the same disk. */
  async start(image = this.image, options: Partial<Pick<MachineOptions, "uuid">> = {}): Promise<void> {
    const disks = [{ path: image, format: "qcow2", id: "vda" } as const];
    await this.rig.start(disks, { guest: "none", monitors: 3, deadline: 240_000, ...options });
  }

  /** Writes something new: one cluster that nothing wrote before, and one that every call overwrites. */
  async write(): Promise<void> {
    this.#writes += 1;
    const own = `write -P ${this.#writes} ${this.#writes * 64}k 64k`;
    await this.rig.machine.qemuIoAll(0, [own, `write -P ${this.#writes} 3M 64k`]);
  }

  /** Writes, backs up, and remembers the point. */
  async backup(
    repository = this.rig.repository,
    image = this.image,
    extra: readonly string[] = [],
  ): Promise<PointView> {
    await this.write();
    const args = this.rig.backupArguments(["--repo", repository, ...extra]);
    const point = pointOf((await this.rig.tidemark(args)).events());
    this.remember(point, repository, image);
    return point;
  }

  /** Remembers a point that was made of the machine's disk otherwise. */
  remember(point: PointView, repository = this.rig.repository, image = this.image): void {
    const { proxy } = this.rig;
    const reference = proxy.referenceOf(image, proxy.freezeOf(point.id));
    this.rememberReference(point, reference, repository);
  }

  /** Remembers a point, and the raw file that it must be equal to. */
  rememberReference(point: PointView, reference: string, repository = this.rig.repository): void {
    this.#taken.push({ point, repository, reference });
  }

  /** Copies a repository as it is. */
  async copy(name: string, from = this.rig.repository): Promise<string> {
    const copy = this.rig.directory.file(name);
    await cp(from, copy, { recursive: true });
    return copy;
  }

  /** Ids of the checkpoints whose bitmaps the machine carries, oldest first. */
  async checkpoints(): Promise<string[]> {
    const { checkpoints } = await residueOf(this.rig.machine.monitor);
    return checkpoints.map((name) => parseBitmapName(name)?.checkpoint ?? name).sort();
  }

  /**
   * Every point that was taken holds what the disk held at its freeze: restored by us, and as bare qemu-img reads
   * the repository.
   */
  async proveAll(except: readonly PointView[] = []): Promise<void> {
    const { rig } = this;
    for (const { point, repository, reference } of this.#taken) {
      if (except.includes(point)) continue;
      const expected = { path: reference, format: "raw" } as const;
      const restored = rig.directory.file(`restored-${point.id}.raw`);
      const args = ["restore", `vm@${point.id}`, "--repo", repository, "--disk", "vda", "--to", restored];
      await rig.tidemark([...args, "--quiet", "--force"]);
      expect(await compareImages({ path: restored, format: "raw" }, expected), point.id).toBe("identical");
      const stored = `${repository}/vm/${point.id}/vda.qcow2`;
      const bare = await toRaw(stored, "qcow2", `${restored}.bare`);
      expect(await compareImages({ path: bare, format: "raw" }, expected), point.id).toBe("identical");
    }
    expect(this.#taken.length).toBeGreaterThan(1);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.rig[Symbol.asyncDispose]();
  }
}

/** Why a point's disk is not the plain increment of its own bitmap; null when it is. */
export function reasonOf(point: PointView): string | null {
  const [disk] = point.disks;
  return disk === undefined ? "no disk" : disk.reason;
}

/** A point's disk is the plain increment of its disk at another point. */
export function expectIncrement(point: PointView, parent: PointView): void {
  expect(point.disks).toMatchObject([{ kind: "incremental", reason: null, parent: parent.id }]);
}
