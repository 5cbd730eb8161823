import type { Writable } from "node:stream";
import { once } from "node:events";
import { MiB } from "../../bytes/index.js";
import type { DiskPiece } from "../../transfer/index.js";
import type { RestoreTarget } from "./target.js";

const ZEROES = Buffer.alloc(MiB);

/** Raw bytes, in order, to a stream: a pipe cannot skip, so zeroes are written out. */
export function streamTarget(stream: Writable): RestoreTarget {
  const write = async (bytes: Buffer): Promise<void> => {
    if (!stream.write(bytes)) await once(stream, "drain");
  };
  return {
    name: "-",
    async write({ bytes, length }: DiskPiece) {
      if (bytes !== undefined) {
        await write(bytes);
        return;
      }
      for (let left = length; left > 0; left -= ZEROES.length) {
        await write(ZEROES.subarray(0, Math.min(left, ZEROES.length)));
      }
    },
    async commit() {
      await new Promise<void>((resolve, reject) =>
        stream.write("", (error) => (error ? reject(error) : resolve())),
      );
    },
    async abort() {
      // What went down a pipe cannot be taken back; the exit code says that it is not whole.
    },
  };
}
