import { setImmediate as yieldToSockets } from "node:timers/promises";
import { isZero } from "../bytes/index.js";
import { endOf, totalLength, type Extent } from "../extent/index.js";
import { negotiate, openSocket, type NbdClient, type NbdSocket } from "../nbd/index.js";
import { FrameEncoder, frameBound } from "../qcow2/index.js";
import type { FrameExport, FrameReply, FrameRequest } from "./frame-reader.js";
import { serveThread, type ThreadResult } from "./thread.js";

/** Compressed between two looks at the sockets, so that reading the next unit goes on meanwhile. */
const CLUSTERS_BETWEEN_YIELDS = 4;

/** This thread's own connection to each export, and its own compression context: raw data never leaves it. */
const sockets: NbdSocket[] = [];
const clients: NbdClient[] = [];
let encoder: FrameEncoder | undefined;

/** Connects to every export and says nothing yet: the file descriptors can be handed to another process first. */
async function open(exports: readonly FrameExport[]): Promise<ThreadResult> {
  // Held: whoever disconnects before the exports are gone may abort the machine.
  for (const { address } of exports) sockets.push(await openSocket(address, { hold: true }));
  return { value: sockets.map((socket) => socket.fd) };
}

async function greet({
  exports,
  level,
}: {
  exports: readonly FrameExport[];
  level: number;
}): Promise<ThreadResult> {
  encoder = new FrameEncoder(level);
  for (const [index, { exportName }] of exports.entries()) {
    const socket = sockets[index];
    if (socket === undefined) throw new RangeError(`export ${exportName} was not opened`);
    clients.push(await negotiate(socket, { exportName }));
  }
  return { value: undefined };
}

/** Reads a unit's extents, drops the clusters that are all zero, and packs a zstd frame for each of the others. */
async function read(request: FrameRequest): Promise<ThreadResult> {
  const { extents, clusterSize } = request;
  const client = clients[request.export];
  if (client === undefined || encoder === undefined) throw new RangeError("read before greet");
  const raw = Buffer.allocUnsafe(totalLength(extents));
  await readExtents(client, extents, raw);

  const bound = Math.ceil(raw.length / clusterSize) * frameBound(clusterSize);
  const payload =
    request.spare !== undefined && request.spare.byteLength >= bound ? request.spare : new ArrayBuffer(bound);
  const into = Buffer.from(payload);
  const frames: { cluster: number; length: number }[] = [];
  const zeros: number[] = [];
  let used = 0;
  let done = 0;
  for (const { cluster, bytes } of clustersOf(extents, raw, clusterSize)) {
    if (isZero(bytes)) {
      zeros.push(cluster);
      continue;
    }
    const length = encoder.encode(bytes, into, used);
    frames.push({ cluster, length });
    used += length;
    done += 1;
    if (done % CLUSTERS_BETWEEN_YIELDS === 0) await yieldToSockets();
  }
  return { value: { payload, used, frames, zeros } satisfies FrameReply, transfer: [payload] };
}

async function readExtents(client: NbdClient, extents: readonly Extent[], raw: Buffer): Promise<void> {
  const reads: Promise<void>[] = [];
  let at = 0;
  for (const { offset, length } of extents) {
    reads.push(client.read(offset, raw.subarray(at, at + length)));
    at += length;
  }
  await Promise.all(reads);
}

/** The clusters of a unit in order; the last one of a disk that does not fill its cluster is padded with zeroes. */
function* clustersOf(
  extents: readonly Extent[],
  raw: Buffer,
  clusterSize: number,
): Generator<{ cluster: number; bytes: Buffer }> {
  let at = 0;
  for (const extent of extents) {
    for (let offset = extent.offset; offset < endOf(extent); offset += clusterSize) {
      const length = Math.min(clusterSize, endOf(extent) - offset);
      const bytes = raw.subarray(at, at + length);
      const whole =
        length === clusterSize ? bytes : Buffer.concat([bytes, Buffer.alloc(clusterSize - length)]);
      yield { cluster: offset / clusterSize, bytes: whole };
      at += length;
    }
  }
}

/** Closes the connections without a farewell: the exports are gone already, in the safe order of teardown. */
function close(): ThreadResult {
  for (const client of clients) client.destroy();
  for (const socket of sockets) socket.destroy();
  return { value: undefined };
}

serveThread({ open, greet, read, close });
