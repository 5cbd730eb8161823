import { workerData } from "node:worker_threads";
import { ClusterDecoder, type ClusterFormat } from "../qcow2/index.js";
import type { DecodeRequest } from "./frame-decoder.js";
import { serveThread, type ThreadResult } from "./thread.js";

/** This thread's decoder of a format, and room for a cluster of which a part is wanted. */
interface Decoding {
  readonly decoder: ClusterDecoder;
  readonly cluster: Buffer;
}

/** One for each format that came by. */
const decodings = new Map<string, Decoding>();

function decodingOf(format: ClusterFormat): Decoding {
  const key = JSON.stringify(format);
  let found = decodings.get(key);
  if (found === undefined) {
    found = { decoder: new ClusterDecoder(format), cluster: Buffer.alloc(format.clusterSize) };
    decodings.set(key, found);
  }
  return found;
}

/** What all threads share. */
const memory = Buffer.from(workerData as SharedArrayBuffer);

/** Decodes the frames of a request, each to its place. */
function decode({ format, object, at: start, slot, frames, base }: DecodeRequest): ThreadResult {
  const { decoder, cluster } = decodingOf(format);
  for (const { at, storedLength, skip, length, into } of frames) {
    const from = slot + at - start;
    const stored = memory.subarray(from, from + storedLength);
    const place = base + into;
    if (length === format.clusterSize) {
      decoder.decode(stored, memory.subarray(place, place + length), { object, at });
      continue;
    }
    decoder.decode(stored, cluster, { object, at });
    cluster.copy(memory, place, skip, skip + length);
  }
  return { value: undefined };
}

serveThread({ decode });
