import { join } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import type { BitmapIdentity } from "../../point/index.js";
import { STORAGE_DAEMON, StorageDaemon } from "./storage-daemon.js";
import { openImage } from "./offline-image.js";
import { addCheckpoint, prepareTracking } from "./track-image.js";

const NODE = "image";

/** An image of a machine that is off, offered for reading and writing by a storage daemon of ours. */
export class ImageExport {
  readonly address: { readonly transport: "unix"; readonly path: string };
  readonly exportName = NODE;
  readonly #daemon: StorageDaemon;

  private constructor(daemon: StorageDaemon, path: string) {
    this.#daemon = daemon;
    this.address = { transport: "unix", path };
  }

  /**
   * Opens and exports a qcow2 image. What is written passes QEMU's block layer, so bitmaps in the image record it.
   *
   * @throws {BusyError} when another process uses the image
   */
  static async open(
    file: string,
    options: IoOptions & { readonly storageDaemon?: string | undefined } = {},
  ): Promise<ImageExport> {
    const { storageDaemon = STORAGE_DAEMON, signal } = options;
    const daemon = await StorageDaemon.start(storageDaemon, { signal });
    try {
      const path = join(daemon.directory, "nbd.sock");
      await openImage(daemon.qmp, { file, node: NODE }, "qcow2", { signal });
      await daemon.qmp.execute("nbd-server-start", {
        addr: { type: "unix", data: { path } },
        "max-connections": 16,
      });
      await daemon.qmp.execute("block-export-add", {
        ...{ type: "nbd", id: NODE, "node-name": NODE, name: NODE },
        writable: true,
      });
      return new ImageExport(daemon, path);
    } catch (error) {
      await daemon[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Before it gets a point's content: see `prepareTracking`. */
  async prepareTracking(repositoryTag: string, io: IoOptions = {}): Promise<void> {
    await prepareTracking(this.#daemon.qmp, NODE, repositoryTag, io);
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
