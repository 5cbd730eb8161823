import type { Writable } from "node:stream";
import { MiB, type IoOptions } from "../../bytes/index.js";
import type { DiskPiece } from "../../transfer/index.js";
import type { RestoreTarget } from "./target.js";

const ZEROES = Buffer.alloc(MiB);

/** Raw bytes, in order, to a stream: a pipe cannot skip, so zeroes are written out. */
export function streamTarget(stream: Writable): RestoreTarget {
  // Not "drain": a stream that failed before is silent, while every write is answered.
  const write = (bytes: Buffer): Promise<void> =>
    new Promise((resolve, reject) => {
      const hasRoom = stream.write(bytes, (error) => (error ? reject(error) : resolve()));
      if (hasRoom) resolve();
    });
  let written = 0;
  return {
    get written() {
      return written;
    },
    async write({ bytes, length }: DiskPiece, { signal }: IoOptions = {}) {
      written += length;
      if (bytes !== undefined) {
        // A stream may hand on what it was given, and answer long before whoever gets it has read it.
        await write(Buffer.from(bytes));
        return;
      }
      for (let left = length; left > 0; left -= ZEROES.length) {
        signal?.throwIfAborted();
        await write(ZEROES.subarray(0, Math.min(left, ZEROES.length)));
      }
    },
    settle: () => Promise.resolve(),
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
