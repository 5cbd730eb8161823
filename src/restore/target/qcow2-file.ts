import { open } from "node:fs/promises";
import type { HeadLastSink, IoOptions } from "../../bytes/index.js";
import { trackImage } from "../../machine/index.js";
import type { BitmapIdentity } from "../../point/index.js";
import { DEFAULT_CLUSTER_SIZE, PlainImageWriter } from "../../qcow2/index.js";
import type { DiskPiece } from "../../transfer/index.js";
import { FileAppender } from "./file-appender.js";
import type { PartialFile } from "./partial-file.js";
import { nonZeroRuns, writeAll } from "./raw-file.js";
import type { RestoreTarget } from "./target.js";

/**
 * A qcow2 file for a machine to run on: plain clusters, sparse.
 *
 * @param length bytes of the disk
 * @param options.track the checkpoint that it is to hold
 */
export async function qcow2FileTarget(
  partial: PartialFile,
  length: number,
  options: TrackOptions = {},
): Promise<RestoreTarget> {
  const writer = PlainImageWriter.create(await partialFileSink(partial, options), length);
  let written = 0;
  return {
    get written() {
      return written;
    },
    async write({ offset, bytes }: DiskPiece) {
      if (bytes === undefined) return;
      for (const { start, end } of nonZeroRuns(bytes)) {
        await writer.write(offset + start, bytes.subarray(start, end));
        written += end - start;
      }
    },
    settle: () => Promise.resolve(),
    commit: () => writer.finish(),
    abort: () => writer.abort(),
  };
}

/** What becomes of the finished file before it gets its name. */
interface TrackOptions extends IoOptions {
  readonly track?: BitmapIdentity | undefined;
  readonly storageDaemon?: string | undefined;
}

async function partialFileSink(partial: PartialFile, options: TrackOptions): Promise<HeadLastSink> {
  const file = await partial.create();
  const body = new FileAppender(file, DEFAULT_CLUSTER_SIZE);
  return {
    append: (bytes) => body.append(bytes),
    async commit(head) {
      await body.settle();
      await writeAll(file, head, 0);
      await file.sync();
      await file.close();
      if (options.track !== undefined) {
        await trackImage(partial.path, options.track, options);
        await syncFile(partial.path);
      }
      await partial.commit();
    },
    async abort() {
      await body.end();
      await file.close();
      await partial.remove();
    },
  };
}

async function syncFile(path: string): Promise<void> {
  await using file = await open(path, "r");
  await file.sync();
}
