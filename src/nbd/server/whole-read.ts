import { ByteWriter, MiB, type IoOptions } from "../../bytes/index.js";
import { messageOf } from "../../errors/index.js";
import { NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA } from "../constants.js";
import type { RequestFrame } from "../frames.js";
import { encodeChunk, encodeSimpleReply } from "./frames.js";
import type { Peer } from "./peer.js";
import type { Agreement, ServedPiece } from "./served-export.js";

/** Bytes of a read that are in memory at most: an answer in one piece that is longer is sent while it is read. */
export const READ_MEMORY = 4 * MiB;

const ZEROES = Buffer.alloc(MiB);

/** Reading failed when a part of the answer was on its way already: there is no way to say so. */
export class ReplyBroken extends Error {}

/**
 * Answers a read whose range is within the export in one piece, for a client that wants or knows nothing else.
 *
 * @throws {ReplyBroken} when the connection is good for nothing any more
 * @throws what reading threw: nothing was sent, and an error may follow
 */
export async function sendWhole(
  peer: Peer,
  { export: disk, isStructured }: Agreement,
  { offset, length, cookie }: RequestFrame,
  options: IoOptions,
): Promise<void> {
  const pieces = disk.read(offset, length, options);
  const place = new ByteWriter(8).u64(offset).finish();
  const whole = { flags: NBD_REPLY_FLAG_DONE, type: NBD_REPLY_TYPE_OFFSET_DATA, cookie };
  const head = isStructured ? encodeChunk(whole, place, length) : encodeSimpleReply(cookie, 0);
  if (length > READ_MEMORY) {
    await peer.sendInParts(partsOf(head, pieces));
    return;
  }
  const parts: Uint8Array[] = [];
  for await (const piece of pieces) parts.push(...contentOf(piece));
  await peer.send(head, ...parts);
}

/** The head goes with the first piece: until then an error can be told as one. */
async function* partsOf(head: Buffer, pieces: AsyncIterable<ServedPiece>): AsyncGenerator<Uint8Array[]> {
  let first: Uint8Array[] = [head];
  try {
    for await (const piece of pieces) {
      yield [...first, ...contentOf(piece)];
      first = [];
    }
  } catch (error) {
    if (first.length > 0) throw error;
    throw new ReplyBroken(`A read failed in the middle of its answer: ${messageOf(error)}`, { cause: error });
  }
}

/** The bytes of a piece; zeroes are not made anew each time. */
function contentOf({ length, bytes }: ServedPiece): Uint8Array[] {
  if (bytes !== undefined) return [bytes];
  const parts: Uint8Array[] = [];
  for (let done = 0; done < length; done += ZEROES.length)
    parts.push(ZEROES.subarray(0, Math.min(ZEROES.length, length - done)));
  return parts;
}
