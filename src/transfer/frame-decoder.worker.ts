import { ClusterDecoder } from "../qcow2/index.js";
import type { DecodeRequest } from "./frame-decoder.js";
import { serveThread, type ThreadResult } from "./thread.js";

const decoder = new ClusterDecoder();

/** Decodes the frames of a unit into one buffer, each cluster at its place. */
function decode(request: DecodeRequest): ThreadResult {
  const stored = Buffer.from(request.stored);
  const output = new ArrayBuffer(request.frames.length * request.clusterSize);
  const into = Buffer.from(output);
  for (const [index, { at, length }] of request.frames.entries()) {
    const start = index * request.clusterSize;
    const cluster = into.subarray(start, start + request.clusterSize);
    decoder.decode(request.compression, stored.subarray(at, at + length), cluster);
  }
  return { value: output, transfer: [output] };
}

serveThread({ decode });
