import { ClusterDecoder, type ClusterFormat } from "../qcow2/index.js";
import type { FrameRun } from "./range-reader.js";
import { serveThread, type ThreadResult } from "./thread.js";

/** This thread's decoders, one for each format that came by. */
const decoders = new Map<string, ClusterDecoder>();

function decoderOf(format: ClusterFormat): ClusterDecoder {
  const key = JSON.stringify(format);
  const decoder = decoders.get(key) ?? new ClusterDecoder(format);
  decoders.set(key, decoder);
  return decoder;
}

/** Decodes the frames of a run into one buffer, one cluster after another. */
function decode({ format, object, at, stored, frames }: FrameRun): ThreadResult {
  const decoder = decoderOf(format);
  const from = Buffer.from(stored);
  // Every byte of it is written: nothing has to be cleared.
  const into = Buffer.allocUnsafeSlow(frames.length * format.clusterSize);
  for (const [index, frame] of frames.entries()) {
    const start = index * format.clusterSize;
    const cluster = into.subarray(start, start + format.clusterSize);
    decoder.decode(from.subarray(frame.at, frame.at + frame.length), cluster, { object, at: at + frame.at });
  }
  const output = into.buffer;
  return { value: output, transfer: [output] };
}

serveThread({ decode });
