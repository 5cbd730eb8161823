import { open } from "node:fs/promises";
import type { IoOptions } from "../../bytes/index.js";
import { BusyError, messageOf, NotFoundError, TidemarkError } from "../../errors/index.js";
import { QmpCommandError, type QmpClient } from "../../qmp/index.js";

/** Formats of images that a machine runs on, and that can be told from their first bytes. */
export type ImageFormat = "qcow2" | "raw";

/** "QFI\xfb": what every qcow2 file begins with. */
const QCOW2_MAGIC = Buffer.from([0x51, 0x46, 0x49, 0xfb]);

/** qcow2 by its first bytes, else raw. @throws {NotFoundError} when there is no such file */
export async function formatOf(file: string): Promise<ImageFormat> {
  try {
    await using handle = await open(file, "r");
    const { buffer, bytesRead } = await handle.read(
      Buffer.alloc(QCOW2_MAGIC.length),
      0,
      QCOW2_MAGIC.length,
      0,
    );
    return bytesRead === QCOW2_MAGIC.length && buffer.equals(QCOW2_MAGIC) ? "qcow2" : "raw";
  } catch (error) {
    throw new NotFoundError("TM_IMAGE_NOT_FOUND", `Cannot open image ${file}: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

/**
 * Opens an image for writing, as node `node`.
 *
 * @throws {BusyError} when another process uses it
 */
export async function openImage(
  qmp: QmpClient,
  { file, node }: { readonly file: string; readonly node: string },
  driver: ImageFormat,
  options: IoOptions,
): Promise<void> {
  try {
    await qmp.execute(
      "blockdev-add",
      { driver, "node-name": node, file: { driver: "file", filename: file } },
      options,
    );
  } catch (error) {
    if (isLockRefusal(error)) throw inUse(file, error);
    if (!(error instanceof QmpCommandError)) throw error;
    throw new TidemarkError("TM_IMAGE_OPEN", `Cannot open image ${file}: ${error.description}`, {
      cause: error,
    });
  }
}

/** Whether QEMU refuses because of a lock. All of its errors are of one class: its words have to do. */
export function isLockRefusal(error: unknown): boolean {
  return error instanceof QmpCommandError && /Failed to get .* lock/.test(error.description);
}

/** The error for an image that another process uses. */
export function inUse(file: string, cause: unknown): BusyError {
  return new BusyError("TM_IMAGE_BUSY", `Cannot open image ${file}: another process uses it`, {
    cause,
    hint: "A machine seems to run on it: shut it down first; a backup of a live machine takes --qmp",
  });
}
