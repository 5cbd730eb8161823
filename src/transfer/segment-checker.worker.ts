import { createHash } from "node:crypto";
import { isZero } from "../bytes/index.js";
import { messageOf, DamageError } from "../errors/index.js";
import { ClusterDecoder, frameLength, type ClusterFormat } from "../qcow2/index.js";
import type { SegmentCheck } from "./segment-checker.js";
import { serveThread, type ThreadResult } from "./thread.js";

/** Checks a segment. The value is what is wrong; undefined when nothing is. */
function check({ bytes, at, sha256, frames }: SegmentCheck): ThreadResult {
  const stored = Buffer.from(bytes);
  if (createHash("sha256").update(stored).digest("hex") !== sha256) {
    return { value: `bytes ${at} to ${at + stored.length - 1} differ from what was stored` };
  }
  return { value: frames === undefined ? undefined : decodeAll(stored, at, frames) };
}

/** Decodes the frames that a segment consists of, one after another; zeroes may follow the last one. */
function decodeAll(stored: Buffer, at: number, format: ClusterFormat): string | undefined {
  const decoder = new ClusterDecoder(format);
  const cluster = Buffer.allocUnsafe(format.clusterSize);
  try {
    for (let next = 0; next < stored.length;) {
      const rest = stored.subarray(next);
      // No frame begins with a zero: from here on it is padding.
      if (rest[0] === 0 && isZero(rest)) return undefined;
      const origin = { object: "the image", at: at + next };
      const length = frameLength(rest, origin);
      decoder.decode(rest.subarray(0, length), cluster, origin);
      next += length;
    }
    return undefined;
  } catch (error) {
    if (error instanceof DamageError) return messageOf(error);
    throw error;
  }
}

serveThread({ check });
