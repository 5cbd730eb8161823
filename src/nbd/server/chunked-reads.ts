import { ByteWriter, type IoOptions } from "../../bytes/index.js";
import {
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
} from "../constants.js";
import type { RequestFrame } from "../frames.js";
import { encodeChunk } from "./frames.js";
import type { Peer } from "./peer.js";
import type { ServedExport } from "./served-export.js";

/**
 * Reads that follow one another on the disk, answered in chunks, as they come: what is zero as holes. Clients ask for a disk in
 * small parts, many of them at once; it costs much less to read them together.
 */
export class ChunkedReads {
  /** In the order of the disk; of the first one, only what was not sent yet. */
  readonly #left: RequestFrame[];

  /** @param requests each begins where the one before ends */
  constructor(requests: readonly RequestFrame[]) {
    this.#left = [...requests];
  }

  /** What was not answered: requests for the rest of each. */
  get left(): readonly RequestFrame[] {
    return this.#left;
  }

  /**
   * Answers all.
   *
   * @throws {PeerGone} when the client left
   * @throws what reading threw: chunks may have been sent, `left` can still be answered, or refused
   */
  async send(peer: Peer, disk: ServedExport, options: IoOptions): Promise<void> {
    const [first] = this.#left;
    if (first === undefined) return;
    const total = this.#left.reduce((sum, { length }) => sum + length, 0);
    for await (const { offset, length, bytes } of disk.read(first.offset, total, options)) {
      const parts: Uint8Array[] = [];
      for (let at = offset; at < offset + length;) {
        const next = this.#next(offset + length);
        const content = bytes?.subarray(at - offset, next.end - offset);
        parts.push(...encodePart(next.cookie, at, next.end - at, content, next.flags));
        at = next.end;
      }
      await peer.send(...parts);
    }
    // What has no bytes has no pieces.
    for (let rest = this.#left.shift(); rest !== undefined; rest = this.#left.shift()) {
      const done = { flags: NBD_REPLY_FLAG_DONE, type: NBD_REPLY_TYPE_NONE, cookie: rest.cookie };
      await peer.send(encodeChunk(done, Buffer.alloc(0)));
    }
  }

  /** Takes what the next request wants of the disk up to `end`. */
  #next(end: number): { readonly cookie: bigint; readonly end: number; readonly flags: number } {
    const [request] = this.#left;
    if (request === undefined) throw new RangeError(`more was read than was asked for, up to ${end}`);
    const { cookie } = request;
    const stop = request.offset + request.length;
    if (stop <= end) {
      this.#left.shift();
      return { cookie, end: stop, flags: NBD_REPLY_FLAG_DONE };
    }
    this.#left[0] = { ...request, offset: end, length: stop - end };
    return { cookie, end, flags: 0 };
  }
}

/** A part of an answer; `bytes` is undefined for a hole. */
function encodePart(
  cookie: bigint,
  offset: number,
  length: number,
  bytes: Uint8Array | undefined,
  flags: number,
): Uint8Array[] {
  if (bytes === undefined) {
    const hole = { flags, type: NBD_REPLY_TYPE_OFFSET_HOLE, cookie };
    return [encodeChunk(hole, new ByteWriter(12).u64(offset).u32(length).finish())];
  }
  const data = { flags, type: NBD_REPLY_TYPE_OFFSET_DATA, cookie };
  return [encodeChunk(data, new ByteWriter(8).u64(offset).finish(), length), bytes];
}
