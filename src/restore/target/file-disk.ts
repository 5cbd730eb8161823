import { constants } from "node:fs";
import { open, type FileHandle } from "node:fs/promises";
import { isZero, MiB } from "../../bytes/index.js";
import { BusyError, UsageError } from "../../errors/index.js";
import { chop } from "../../extent/index.js";
import type { DiskAccess } from "./disk-access.js";
import { FILE_IN_FLIGHT, writeAll } from "./raw-file.js";
import { UnderWay } from "./under-way.js";

const ZEROES = Buffer.alloc(2 * MiB);

/**
 * A block device, opened for this process alone.
 *
 * @throws {BusyError} when it is mounted, or in use by another driver
 */
export async function openBlockDevice(path: string): Promise<DiskAccess> {
  const file = await openExclusive(path);
  try {
    return fileDisk(file, await sizeOfDevice(file));
  } catch (error) {
    await file.close();
    throw error;
  }
}

function fileDisk(file: FileHandle, size: number): DiskAccess {
  const read = async (offset: number, length: number): Promise<Buffer> => {
    const bytes = Buffer.allocUnsafe(length);
    for (let done = 0; done < length;) {
      const { bytesRead } = await file.read(bytes, done, length - done, offset + done);
      if (bytesRead === 0) throw new UsageError(`The target ends at ${offset + done}, before the disk does`);
      done += bytesRead;
    }
    return bytes;
  };
  const writes = new UnderWay(FILE_IN_FLIGHT);
  return {
    size,
    blockSize: 1,
    read,
    write: (offset, bytes) => writes.begin(bytes.length, () => writeAll(file, bytes, offset)),
    async writeZeroes(offset, length) {
      // Node has no call that zeroes a range. Reading first keeps what is sparse, or thin, as it is.
      for (const part of chop([{ offset, length }], ZEROES.length)) {
        if (isZero(await read(part.offset, part.length))) continue;
        await writeAll(file, ZEROES.subarray(0, part.length), part.offset);
      }
    },
    settle: () => writes.settle(),
    async flush() {
      await writes.settle();
      await file.sync();
    },
    async close() {
      await writes.end();
      // What was written is safe since flush(), or given up.
      await file.close().catch(() => undefined);
    },
  };
}

async function openExclusive(path: string): Promise<FileHandle> {
  try {
    // Linux: O_EXCL without O_CREAT refuses a block device that is in use (open(2)).
    return await open(path, constants.O_RDWR | constants.O_EXCL);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EBUSY") throw error;
    throw new BusyError("TM_TARGET_BUSY", `Cannot restore to ${path}: it is mounted or in use`, {
      cause: error,
      hint: "Unmount it, or end what uses it",
    });
  }
}

/** A device's stat() says 0: where it ends is found by looking for the last byte that can be read. */
async function sizeOfDevice(file: FileHandle): Promise<number> {
  const canRead = async (at: number): Promise<boolean> =>
    (await file.read(Buffer.alloc(1), 0, 1, at)).bytesRead === 1;
  if (!(await canRead(0))) return 0;
  let least = 1;
  let most = 2 ** 53 - 1;
  while (least < most) {
    const middle = least + Math.floor((most - least) / 2);
    if (await canRead(middle)) least = middle + 1;
    else most = middle;
  }
  return least;
}
