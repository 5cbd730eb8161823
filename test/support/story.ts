import { expect } from "vitest";
import { checkImage, CLEAN, compareImages, toRaw } from "./image.js";
import type { TestDisk } from "./qemu.js";
import { pointOf, Rig, type PointView } from "./rig.js";

/** A point, and the image of the machine that each of its disks was read from, by the disk's name. */
interface Expected {
  readonly point: PointView;
  readonly images: Readonly<Record<string, string>>;
  readonly repository: string;
}

interface StatusView {
  readonly disks: readonly {
    readonly name: string;
    readonly next: { readonly kind: string; readonly reason: string | null };
  }[];
  readonly leftovers: readonly unknown[];
}

/** A point that was taken, and of each disk, by its name, "incremental", or why it is compared or full. */
export interface Taken {
  readonly point: PointView;
  readonly kinds: Readonly<Record<string, string>>;
}

/** A bitmap as QEMU shows it. */
export interface Bitmap {
  readonly name: string;
  readonly granularity: number;
  readonly recording: boolean;
  readonly persistent: boolean;
  readonly count: number;
}

/** A rig that remembers its points, so that all of them are looked at when the last one is there. */
export class Story implements AsyncDisposable {
  readonly rig: Rig;
  #expected: Expected[] = [];
  /** What an image held that was backed up without its machine, by the point's id. */
  readonly #held = new Map<string, string>();

  private constructor(rig: Rig) {
    this.rig = rig;
  }

  static async begin(): Promise<Story> {
    return new Story(await Rig.create());
  }

  /** The machine starts with these disks; unless said otherwise nothing runs in it. The one before has ended. */
  async start(disks: readonly TestDisk[], options: Parameters<Rig["start"]>[1] = {}): Promise<void> {
    await this.rig.start(disks, { guest: "none", deadline: 240_000, ...options });
  }

  /** The machine ends cleanly, and starts with these disks. */
  async restart(disks: readonly TestDisk[], options: Parameters<Rig["start"]>[1] = {}): Promise<void> {
    await this.rig.machine.quit();
    await this.start(disks, options);
  }

  /** Resizes a disk under the running machine. */
  async resize(disk: number, size: number): Promise<void> {
    await this.rig.machine.monitor.execute("block_resize", { "node-name": `node${disk}`, size });
  }

  /** Writes through a device, by its number, device id or QOM path. */
  async write(disk: number | string, ...commands: readonly string[]): Promise<void> {
    await this.rig.machine.qemuIoAll(disk, commands);
  }

  /**
   * Takes a point.
   *
   * @param images path of the image that each disk is expected to be read from, by the disk's expected name
   * @returns by the disk's name: "incremental", or why it is compared or full
   */
  async backup(
    images: Readonly<Record<string, string>>,
    extra: readonly string[] = [],
    repository = this.rig.repository,
  ): Promise<Taken> {
    const point = await this.rig.backup([...extra, "--repo", repository]);
    return this.#remember(point, images, repository);
  }

  /** Takes a point of an image of the machine, which is off. */
  async backupImage(name: string, image: string): Promise<Taken> {
    const { repository } = this.rig;
    const args = ["backup", "--machine", "vm", "--repo", repository, "--json"];
    const result = await this.rig.tidemark([...args, "--image", `${name}=${image}`]);
    const point = pointOf(result.events());
    const held = await toRaw(image, "qcow2", this.rig.directory.file(`held-${point.id}.raw`));
    this.#held.set(point.id, held);
    return this.#remember(point, { [name]: image }, repository);
  }

  /** What `status` says of the next backup, in the words that the backup itself will have. */
  async next(): Promise<Readonly<Record<string, string>>> {
    const { disks } = await this.#status();
    return Object.fromEntries(
      disks.map(({ name, next }) => [name, next.reason?.replace(/^will be /, "") ?? next.kind]),
    );
  }

  /** Remembers a point that the test took by itself, through the rig's proxy. */
  adopt(point: PointView, images: Readonly<Record<string, string>>): Taken {
    this.rig.adopt(point);
    return this.#remember(point, images, this.rig.repository);
  }

  /** What `status` calls leftovers of dead runs. */
  async leftovers(): Promise<readonly unknown[]> {
    return (await this.#status()).leftovers;
  }

  async #status(): Promise<StatusView> {
    const args = ["status", "--machine", "vm", "--repo", this.rig.repository, "--qmp", this.rig.proxy.socket];
    return (await this.rig.tidemark([...args, "--json"])).json() as StatusView;
  }

  #remember(point: PointView, images: Readonly<Record<string, string>>, repository: string): Taken {
    expect(point.disks.map(({ name }) => name).sort()).toEqual(Object.keys(images).sort());
    this.#expected.push({ point, images: { ...images }, repository });
    return { point, kinds: kindsOf(point) };
  }

  /** A point that cannot be restored any more: the test damaged it. */
  forget(point: PointView): void {
    this.#expected = this.#expected.filter((expected) => expected.point.id !== point.id);
  }

  /** Restores every point, by tidemark and by bare qemu-img, and checks every image. */
  async proveAll(): Promise<void> {
    expect(this.#expected.length).toBeGreaterThan(0);
    for (const [number, { point, images, repository }] of this.#expected.entries()) {
      const directory = this.rig.directory.file(`proof-${number}`);
      const args = ["restore", `vm@${point.id}`, "--repo", repository, "--to-dir", directory, "--quiet"];
      await this.rig.tidemark(args);
      for (const { name, image } of point.disks) {
        const stored = `${repository}/vm/${point.id}/${image}`;
        const bare = await toRaw(stored, "qcow2", `${directory}/${name}.bare`);
        const reference = {
          path: this.#held.get(point.id) ?? this.rig.reference(point, images[name] ?? ""),
          format: "raw",
        } as const;
        const label = `point ${number + 1} of ${this.#expected.length}, disk ${name}`;
        const restored = { path: `${directory}/${name}.raw`, format: "raw" } as const;
        expect(await compareImages(restored, reference), `${label}, tidemark restore`).toBe("identical");
        expect(await compareImages({ path: bare, format: "raw" }, reference), `${label}, qemu-img`).toBe(
          "identical",
        );
        const { report, ...found } = await checkImage(stored);
        expect(found, report).toEqual(CLEAN);
      }
    }
  }

  /** The bitmaps of a disk, in the order of their names. */
  async bitmaps(image: string): Promise<Bitmap[]> {
    const nodes =
      await this.rig.machine.monitor.execute<{ file: string; drv: string; "dirty-bitmaps"?: Bitmap[] }[]>(
        "query-named-block-nodes",
      );
    const node = nodes.find(({ file, drv }) => file === image && drv !== "file");
    return (node?.["dirty-bitmaps"] ?? []).sort((a, b) => a.name.localeCompare(b.name));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.rig[Symbol.asyncDispose]();
  }
}

/** By the disk's name: "incremental", or why it is compared or full. */
export function kindsOf(point: PointView): Record<string, string> {
  return Object.fromEntries(
    point.disks.map(({ name, kind, reason }) => {
      expect(kind).toBe(reason === null || reason.startsWith("compared: ") ? "incremental" : "full");
      return [name, reason ?? kind];
    }),
  );
}

/** A disk of a point, by its name. */
export function diskOf(point: PointView, name: string): PointView["disks"][number] {
  const found = point.disks.find((disk) => disk.name === name);
  if (found === undefined) throw new Error(`Point ${point.id} has no disk ${name}`);
  return found;
}

/** A disk of a machine. */
export const qcow2 = (path: string, more: Partial<TestDisk> = {}): TestDisk => ({
  path,
  format: "qcow2",
  ...more,
});
export const raw = (path: string, more: Partial<TestDisk> = {}): TestDisk => ({
  path,
  format: "raw",
  ...more,
});
