import { join } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { TidemarkError } from "../../errors/index.js";
import type { BitmapIdentity } from "../../point/index.js";
import { QmpCommandError } from "../../qmp/index.js";
import { STORAGE_DAEMON, StorageDaemon } from "./storage-daemon.js";
import { inUse, isLockRefusal, openImage, type ImageFormat } from "./offline-image.js";
import { addCheckpoint, removeCheckpoints, requireTrackable } from "./track-image.js";

const NODE = "image";

/** An image of a machine that is off, open for writing in a storage daemon of ours, and served by it on demand. */
export class ImageExport {
  readonly address: { readonly transport: "unix"; readonly path: string };
  readonly exportName = NODE;
  readonly #file: string;
  readonly #daemon: StorageDaemon;

  private constructor(daemon: StorageDaemon, file: string) {
    this.#daemon = daemon;
    this.#file = file;
    this.address = { transport: "unix", path: join(daemon.directory, "nbd.sock") };
  }

  /**
   * Opens an image, a qcow2 one with what it is an overlay of. From now on nobody else can, a raw one from `serve` on;
   * nothing of it is changed yet.
   *
   * @throws {BusyError} when another process uses the image
   */
  static async open(
    file: string,
    options: IoOptions & { readonly format: ImageFormat; readonly storageDaemon?: string | undefined },
  ): Promise<ImageExport> {
    const { format, storageDaemon = STORAGE_DAEMON, signal } = options;
    const daemon = await StorageDaemon.start(storageDaemon, { signal });
    try {
      await openImage(daemon.qmp, { file, node: NODE }, format, { signal });
      return new ImageExport(daemon, file);
    } catch (error) {
      await daemon[Symbol.asyncDispose]();
      throw error;
    }
  }

  /**
   * Exports it for reading and writing. What is written passes QEMU's block layer, so bitmaps in the image record it.
   *
   * @param size bytes that the disk is to have: it is made larger or smaller first
   * @throws {TidemarkError} TM_IMAGE_RESIZE when QEMU cannot resize it, e.g. because of internal snapshots
   * @throws {BusyError} when another process has come to use it
   */
  async serve(size: number, io: IoOptions = {}): Promise<void> {
    const { qmp } = this.#daemon;
    await this.#resize(size, io);
    const addr = { type: "unix", data: { path: this.address.path } } as const;
    await qmp.execute("nbd-server-start", { addr, "max-connections": 16 }, io);
    const served = { type: "nbd", id: NODE, "node-name": NODE, name: NODE } as const;
    await this.#unlessLocked(() => qmp.execute("block-export-add", { ...served, writable: true }, io));
  }

  async #unlessLocked(command: () => Promise<unknown>): Promise<void> {
    try {
      await command();
    } catch (error) {
      throw isLockRefusal(error) ? inUse(this.#file, error) : error;
    }
  }

  async #resize(size: number, io: IoOptions): Promise<void> {
    const { qmp } = this.#daemon;
    const nodes = await qmp.execute("query-named-block-nodes", { flat: true }, io);
    const held = nodes.find(({ name }) => name === NODE)?.image.virtualSize ?? 0;
    if (held === size) return;
    try {
      await qmp.execute("block_resize", { "node-name": NODE, size }, io);
    } catch (error) {
      if (isLockRefusal(error)) throw inUse(this.#file, error);
      if (!(error instanceof QmpCommandError)) throw error;
      throw new TidemarkError(
        "TM_IMAGE_RESIZE",
        `Cannot resize image ${this.#file} from ${held} to ${size} bytes, the disk's: ${error.description}`,
        { cause: error, hint: "Have it replaced by a new image: --force without --only-changed" },
      );
    }
  }

  /** See `requireTrackable`. @throws {UsageError} when it cannot hold a checkpoint of the repository */
  async requireTrackable(repositoryTag: string, io: IoOptions = {}): Promise<void> {
    await requireTrackable(this.#daemon.qmp, NODE, repositoryTag, io);
  }

  /** Before it gets a point's content: see `removeCheckpoints`. */
  async removeCheckpoints(repositoryTag: string, io: IoOptions = {}): Promise<void> {
    await removeCheckpoints(this.#daemon.qmp, repositoryTag, io);
  }

  /** Once it holds a point's content: adds the point's checkpoint. `close` stores it. */
  async track(checkpoint: BitmapIdentity): Promise<void> {
    await addCheckpoint(this.#daemon.qmp, NODE, checkpoint);
  }

  /**
   * Ends the export and the daemon, which stores the image's bitmaps.
   *
   * @throws {TidemarkError} TM_STORAGE_DAEMON when it does not end in order
   */
  async close(): Promise<void> {
    await this.#daemon.stop();
  }
}
