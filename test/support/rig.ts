import { mkdir } from "node:fs/promises";
import { runTidemark, tidemark, type CliEvent, type CliOptions, type CliResult } from "./cli.js";
import { compareImages, createImage, toRaw } from "./image.js";
import { startMachine, type MachineOptions, type TestDisk, type TestMachine } from "./qemu.js";
import { QmpProxy } from "./qmp-proxy.js";
import { temporaryDirectory, type TemporaryDirectory } from "./temporary.js";

/** A point as `--json` shows it; what tests look at. */
export interface PointView {
  readonly id: string;
  readonly name: string | null;
  readonly parent: string | null;
  readonly current: boolean;
  readonly state: string;
  readonly disks: readonly {
    readonly name: string;
    readonly token: string;
    readonly kind: "full" | "incremental";
    readonly reason: string | null;
    readonly parent: string | null;
    readonly virtualSize: number;
    readonly image: string;
    readonly bytes: number;
    readonly dataClusters: number;
    readonly zeroClusters: number;
    readonly dirtyBytes: number | null;
  }[];
}

/**
 * A machine, a repository, and the command line between them, with the reference proxy in front of the machine's
 * monitor: what every test of a whole backup needs.
 */
export class Rig implements AsyncDisposable {
  readonly directory: TemporaryDirectory;
  readonly repository: string;
  /** The disks' references at every freeze, by the point's id and the image's path. */
  readonly #references = new Map<string, ReadonlyMap<string, string>>();
  /** What backups of the machine warned of. */
  readonly warnings: string[] = [];
  readonly #restored = new Set<string>();
  #machine: TestMachine | undefined;
  #proxy: QmpProxy | undefined;
  #starts = 0;

  private constructor(directory: TemporaryDirectory) {
    this.directory = directory;
    this.repository = directory.file("repository");
  }

  /** Makes an empty repository; no machine runs yet. */
  static async create(): Promise<Rig> {
    const rig = new Rig(await temporaryDirectory("tm-rig-"));
    await rig.tidemark(["init", "--repo", rig.repository]);
    return rig;
  }

  /** Makes a disk image. @returns its path */
  async image(name: string, format: "qcow2" | "raw", size: number): Promise<string> {
    return await createImage(this.directory.file(name), format, size);
  }

  get machine(): TestMachine {
    if (this.#machine === undefined) throw new Error("No machine runs");
    return this.#machine;
  }

  get proxy(): QmpProxy {
    if (this.#proxy === undefined) throw new Error("No machine runs");
    return this.#proxy;
  }

  /** Starts the machine (again), with a proxy in front of it. The one before must have ended. */
  async start(disks: readonly TestDisk[], options: Omit<MachineOptions, "disks"> = {}): Promise<TestMachine> {
    await this.#stopProxy();
    await this.#machine?.[Symbol.asyncDispose]();
    this.#machine = await startMachine({ uuid: "11111111-2222-4333-8444-555555555555", ...options, disks });
    this.#starts += 1;
    const references = this.directory.file(`references-${this.#starts}`);
    await mkdir(references);
    this.#proxy = await QmpProxy.start(this.#machine.qmp, { directory: references });
    return this.#machine;
  }

  /** Runs `tidemark`, which must succeed. */
  async tidemark(args: readonly string[], options: CliOptions = {}): Promise<CliResult> {
    return await tidemark(args, this.#with(options));
  }

  /** Runs `tidemark`; any exit code is an answer. */
  async run(args: readonly string[], options: CliOptions = {}): Promise<CliResult> {
    return await runTidemark(args, this.#with(options));
  }

  /** The arguments of a backup of the machine. */
  backupArguments(extra: readonly string[] = []): string[] {
    return [
      "backup",
      "--machine",
      "vm",
      "--repo",
      this.repository,
      "--qmp",
      this.proxy.socket,
      "--json",
      ...extra,
    ];
  }

  /** Backs the machine up and remembers what its disks held. */
  async backup(extra: readonly string[] = []): Promise<PointView> {
    const events = (await this.tidemark(this.backupArguments(extra))).events();
    for (const event of events)
      if (event["event"] === "warning") this.warnings.push(String(event["message"]));
    const point = pointOf(events);
    this.adopt(point);
    return point;
  }

  /** Remembers what the disks held at a point whose freeze has passed the proxy. */
  adopt(point: PointView): void {
    const { references } = this.proxy.freezeOf(point.id);
    this.#references.set(point.id, new Map(references.map(({ source, file }) => [source, file])));
  }

  /** What the disk with that image held at a point. */
  reference(point: PointView, image: string): string {
    const file = this.#references.get(point.id)?.get(image);
    if (file === undefined) throw new Error(`No reference of ${image} at ${point.id}`);
    return file;
  }

  /** Restores all disks of a point, once. @returns the directory, which holds `<disk>.raw` */
  async restore(point: PointView): Promise<string> {
    const directory = this.directory.file(`restored-${point.id}`);
    if (this.#restored.has(point.id)) return directory;
    const args = ["restore", `vm@${point.id}`, "--repo", this.repository, "--to-dir", directory, "--quiet"];
    await this.tidemark(args);
    this.#restored.add(point.id);
    return directory;
  }

  /**
   * Compares disks of a point with what the machine held, twice: as tidemark restores them, and as bare `qemu-img`
   * reads the repository.
   *
   * @param images path of the machine's image, by the disk's name
   * @returns by the disk's name: "identical", or the first difference
   */
  async verify(point: PointView, images: Readonly<Record<string, string>>): Promise<Record<string, string>> {
    const restored = await this.restore(point);
    const verdicts = Object.entries(images).map(async ([disk, image]): Promise<[string, string]> => {
      const reference = { path: this.reference(point, image), format: "raw" } as const;
      const ours = await compareImages({ path: `${restored}/${disk}.raw`, format: "raw" }, reference);
      if (ours !== "identical") return [disk, `restored: ${ours}`];
      const file = point.disks.find(({ name }) => name === disk)?.image ?? "";
      const bare = await toRaw(
        `${this.repository}/vm/${point.id}/${file}`,
        "qcow2",
        this.directory.file(`bare-${point.id}-${disk}.raw`),
      );
      const theirs = await compareImages({ path: bare, format: "raw" }, reference);
      return [disk, theirs === "identical" ? theirs : `qemu-img: ${theirs}`];
    });
    return Object.fromEntries(await Promise.all(verdicts));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stopProxy();
    await this.#machine?.[Symbol.asyncDispose]();
    await this.directory[Symbol.asyncDispose]();
  }

  async #stopProxy(): Promise<void> {
    await this.#proxy?.[Symbol.asyncDispose]();
    this.#proxy = undefined;
  }

  #with(options: CliOptions): CliOptions {
    const env = { TIDEMARK_RUNTIME_DIR: this.directory.file("run"), ...options.env };
    return { ...options, env };
  }
}

/** The point of a backup's result event. */
export function pointOf(events: readonly CliEvent[]): PointView {
  const last = events.at(-1);
  if (last?.["event"] !== "result") throw new Error(`The last event is ${JSON.stringify(last)}`);
  return last["point"] as PointView;
}
