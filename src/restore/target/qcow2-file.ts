import type { HeadLastSink } from "../../bytes/index.js";
import { DEFAULT_CLUSTER_SIZE, PlainImageWriter } from "../../qcow2/index.js";
import type { DiskPiece } from "../../transfer/index.js";
import type { PartialFile } from "./partial-file.js";
import { nonZeroRuns, writeAll } from "./raw-file.js";
import type { RestoreTarget } from "./target.js";

/**
 * A qcow2 file for a machine to run on: plain clusters, sparse.
 *
 * @param length bytes of the disk
 */
export async function qcow2FileTarget(partial: PartialFile, length: number): Promise<RestoreTarget> {
  const writer = PlainImageWriter.create(await partialFileSink(partial), length);
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
    commit: () => writer.finish(),
    abort: () => writer.abort(),
  };
}

async function partialFileSink(partial: PartialFile): Promise<HeadLastSink> {
  const file = await partial.create();
  let position = DEFAULT_CLUSTER_SIZE;
  return {
    async append(bytes) {
      await writeAll(file, bytes, position);
      position += bytes.length;
    },
    async commit(head) {
      await writeAll(file, head, 0);
      await file.sync();
      await file.close();
      await partial.commit();
    },
    async abort() {
      await file.close();
      await partial.remove();
    },
  };
}
