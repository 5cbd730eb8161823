import { basename, extname, resolve } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { NotFoundError, UsageError } from "../../errors/index.js";
import { step } from "../../flow/index.js";
import { isName, requireName } from "../../point/index.js";
import type { QmpClient } from "../../qmp/index.js";
import { describeNode, type DiskNode } from "../discover/discover.js";
import { freezeDisks } from "../freeze/freeze.js";
import { NodeGraph } from "../discover/graph.js";
import { formatOf, inUse, isLockRefusal, openImage, type ImageFormat } from "./offline-image.js";
import { assertFeatures } from "../discover/readiness.js";
import { daemonDirectoryOf, type MachinePlace } from "../run/run-record.js";
import { placeOfImages, Run } from "../run/run.js";
import type { FreezeRequest, FrozenPoint, MachineIdentity, QmpSource, SourceDisk } from "../source.js";
import { STORAGE_DAEMON, StorageDaemon } from "./storage-daemon.js";

/** An image of a machine that is off, and the disk's name if the user gave one. */
export interface ImageChoice {
  readonly file: string;
  readonly name?: string | undefined;
}

/** How to open a machine that is off. */
export interface OfflineMachineOptions extends IoOptions {
  readonly images: readonly ImageChoice[];
  /** Where runs keep their state and locks on this host. */
  readonly runDirectory: string;
  /** The storage daemon's program; default the one in PATH. */
  readonly storageDaemon?: string | undefined;
}

/** An image as it was opened. */
interface OpenedImage extends ImageChoice {
  readonly node: string;
}

/**
 * A machine that is off: its images, opened by a storage daemon of ours. They are opened for writing, so that
 * the checkpoint's bitmap is stored in them, and so that nobody can start the machine meanwhile.
 */
export class OfflineMachine implements QmpSource, AsyncDisposable {
  readonly place: MachinePlace;
  readonly runDirectory: string;
  readonly #daemon: StorageDaemon;
  readonly #run: Run;
  readonly #images: readonly OpenedImage[];
  #disks: readonly SourceDisk[] = [];
  #leaveRecord = false;
  #closed: Promise<void> | undefined;

  private constructor(
    daemon: StorageDaemon,
    run: Run,
    place: MachinePlace,
    runDirectory: string,
    images: readonly OpenedImage[],
  ) {
    this.#daemon = daemon;
    this.#run = run;
    this.place = place;
    this.runDirectory = runDirectory;
    this.#images = images;
  }

  /**
   * Opens the images. Nothing in them is changed.
   *
   * @throws {BusyError} when an image is in use, or another run works on it
   * @throws {UsageError | NotFoundError} when there is no such image, or two would have one name
   */
  static async open(options: OfflineMachineOptions): Promise<OfflineMachine> {
    const { runDirectory, storageDaemon = STORAGE_DAEMON, signal } = options;
    const images = chooseImages(options.images);
    const formats: ImageFormat[] = [];
    for (const { file } of images) formats.push(await formatOf(file));
    const place = await placeOfImages(images.map(({ file }) => file));
    const run = await Run.acquire(runDirectory, place, { signal });
    let daemon: StorageDaemon | undefined;
    try {
      await step("machine locked");
      daemon = await StorageDaemon.start(storageDaemon, {
        directory: daemonDirectoryOf(runDirectory, run.id),
        signal,
      });
      await assertFeatures(daemon.qmp, { signal });
      for (const [index, image] of images.entries()) {
        await openImage(daemon.qmp, image, formats[index] ?? "raw", { signal });
      }
      const machine = new OfflineMachine(daemon, run, place, runDirectory, images);
      await machine.refresh({ signal });
      await step("machine opened");
      return machine;
    } catch (error) {
      await daemon?.[Symbol.asyncDispose]();
      run.release();
      throw error;
    }
  }

  get qmp(): QmpClient {
    return this.#daemon.qmp;
  }

  get runId(): string {
    return this.#run.id;
  }

  get identity(): MachineIdentity {
    const { version, package: build } = this.qmp.greeting;
    const number = `${version.major}.${version.minor}.${version.micro}`;
    return {
      name: null,
      uuid: null,
      state: "shut off",
      wasAway: false,
      qemuVersion: build === "" ? number : `${number} (${build})`,
      configuration: {
        disks: this.#disks.map(({ name, format, imageFile }) => ({ name, format, file: imageFile })),
      },
    };
  }

  get disks(): readonly SourceDisk[] {
    return this.#disks;
  }

  assertWorking(): Run {
    return this.#run;
  }

  /** Nobody but this run can use the images: there is nothing in the way. */
  assertReady(): Promise<void> {
    return Promise.resolve();
  }

  /** It is no process that could migrate. */
  assertHere(): Promise<void> {
    return Promise.resolve();
  }

  async refresh(options: IoOptions = {}): Promise<void> {
    const nodes = await this.#look(options);
    this.#disks = this.#images.map(({ node, file, name }) => {
      const found = nodes.find((disk) => disk.node === node);
      if (found === undefined)
        throw new NotFoundError("TM_NO_DISK", `Cannot back up ${file}: the storage daemon lost it`);
      const suggestedName = nameOfFile(file);
      return {
        ...found,
        suggestedName,
        name: name ?? suggestedName,
        anonymous: name === undefined,
        deviceId: null,
        driveId: null,
      };
    });
  }

  async freeze(request: FreezeRequest, options: IoOptions = {}): Promise<FrozenPoint> {
    const { qmp, address } = this.#daemon;
    try {
      return await freezeDisks({
        qmp,
        address,
        run: this.#run,
        request,
        look: async (io) => ({ disks: await this.#look(io), state: "shut off" }),
        signal: options.signal,
        onEnd: (isClean) => {
          this.#leaveRecord ||= !isClean;
        },
      });
    } catch (error) {
      // A raw image is locked only now: its node wants nothing before.
      const files = this.#images.map(({ file }) => file).join(" or ");
      throw isLockRefusal(error) ? inUse(files, error) : error;
    }
  }

  /**
   * Ends the daemon, which stores the checkpoints' bitmaps in the images.
   *
   * @throws {TidemarkError} TM_STORAGE_DAEMON when it does not end in order: checkpoints may be lost
   */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    try {
      await this.#daemon.stop();
      await step("monitor left");
    } finally {
      this.#run.release({ leaveRecord: this.#leaveRecord });
      await step("machine unlocked");
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Whoever wants to know how it ended has called close() before.
    await this.close().catch(() => undefined);
  }

  async #look(options: IoOptions): Promise<DiskNode[]> {
    const [nodes, graph] = await Promise.all([
      this.qmp.execute("query-named-block-nodes", { flat: true }, options),
      this.qmp.execute("x-debug-query-block-graph", undefined, options),
    ]);
    const nodeGraph = new NodeGraph(nodes, graph);
    return this.#images.flatMap(({ node }) => describeNode(nodeGraph, node, null) ?? []);
  }
}

/** Absolute paths, each with a node name; names that were given must be names, and differ. */
function chooseImages(choices: readonly ImageChoice[]): OpenedImage[] {
  const images = choices.map(({ file, name }, index) => ({
    file: resolve(file),
    name: name === undefined ? undefined : requireName("disk", name),
    node: `image${index}`,
  }));
  for (const [index, { file, name }] of images.entries()) {
    const before = images.slice(0, index);
    if (before.some((image) => image.file === file)) throw new UsageError(`Image ${file} was given twice`);
    const called = name ?? nameOfFile(file);
    if (before.every((image) => (image.name ?? nameOfFile(image.file)) !== called)) continue;
    throw new UsageError(`Two disks would have the name "${called}"`, {
      hint: "Give them names of their own: --image NAME=FILE",
    });
  }
  return images;
}

/** What a disk is called after its image: the file's name without its ending. */
function nameOfFile(file: string): string {
  const name = basename(file, extname(file));
  return isName(name) ? name : "disk0";
}
