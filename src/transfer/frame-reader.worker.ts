import { setImmediate as yieldToSockets } from "node:timers/promises";
import { isZero } from "../bytes/index.js";
import { endOf, totalLength, type Extent } from "../extent/index.js";
import { ClusterHasher, ExpectedClusters, HASH_BYTES } from "../hashes/index.js";
import type { NbdClient } from "../nbd/index.js";
import { FrameEncoder, frameBound } from "../qcow2/index.js";
import { ExportConnection } from "./export-connection.js";
import type { FrameExport, FrameReply, FrameRequest } from "./frame-reader.js";
import { serveThread, type ThreadResult } from "./thread.js";

/** Compressed between two looks at the sockets, so that reading the next unit goes on meanwhile. */
const CLUSTERS_BETWEEN_YIELDS = 4;
/** ... where they are hashed only. */
const CLUSTERS_BETWEEN_YIELDS_OF_HASHES = 16;

/** This thread's own connection to each export, and its own compression context: raw data never leaves it. */
let connections: readonly ExportConnection[] = [];
let encoder: FrameEncoder | undefined;

/** Connects to every export and says nothing yet: the file descriptors can be handed to another process first. */
async function open(exports: readonly FrameExport[]): Promise<ThreadResult> {
  connections = exports.map((place) => new ExportConnection(place));
  for (const connection of connections) await connection.open();
  return { value: undefined };
}

/** Connects to one of them once more. */
async function reopen(index: number): Promise<ThreadResult> {
  await connectionTo(index).open();
  return { value: undefined };
}

function descriptors(): ThreadResult {
  return { value: connections.flatMap(({ fileDescriptors }) => fileDescriptors) };
}

async function greet({ index, level }: { index: number; level: number }): Promise<ThreadResult> {
  encoder ??= new FrameEncoder(level);
  await connectionTo(index).greet();
  return { value: undefined };
}

function connectionTo(index: number): ExportConnection {
  const connection = connections[index];
  if (connection === undefined) throw new RangeError(`export ${index} was not opened`);
  return connection;
}

/**
 * Reads a unit's extents, drops the clusters that are all zero or as the parent has them, and packs a zstd frame
 * for each of the others.
 */
async function read(request: FrameRequest): Promise<ThreadResult> {
  const { extents, clusterSize } = request;
  const { client } = connectionTo(request.export);
  if (encoder === undefined) throw new RangeError("read before greet");
  const length = totalLength(extents);
  const memory = takeMemory(length);
  const raw = memory.subarray(0, length);
  await readExtents(client, extents, raw);

  const bound = Math.ceil(raw.length / clusterSize) * frameBound(clusterSize);
  const payload =
    request.spare !== undefined && request.spare.byteLength >= bound ? request.spare : new ArrayBuffer(bound);
  const into = Buffer.from(payload);
  const frames: { cluster: number; length: number }[] = [];
  const zeros: number[] = [];
  const hasher = request.hashKey === undefined ? undefined : new ClusterHasher(request.hashKey);
  const hashes: Buffer[] = [];
  const expected = request.expected === undefined ? undefined : new ExpectedClusters(request.expected);
  let used = 0;
  let done = 0;
  let position = -1;
  for (const { cluster, bytes } of clustersOf(extents, raw, clusterSize)) {
    position += 1;
    if (isZero(bytes)) {
      if (expected?.isZero(position) !== true) zeros.push(cluster);
      continue;
    }
    const hash = hasher?.hash(bytes);
    if (hash !== undefined && expected?.equals(position, hash) === true) {
      if (position % CLUSTERS_BETWEEN_YIELDS_OF_HASHES === 0) await yieldToSockets();
      continue;
    }
    if (hash !== undefined) hashes.push(hash);
    const length = encoder.encode(bytes, into, used);
    frames.push({ cluster, length });
    used += length;
    done += 1;
    if (done % CLUSTERS_BETWEEN_YIELDS === 0) await yieldToSockets();
  }
  // Only after a success: a read that failed may have others beside it that go on writing.
  idleMemory.push(memory);
  const joined = new Uint8Array(hashes.length * HASH_BYTES);
  for (const [index, hash] of hashes.entries()) joined.set(hash, index * HASH_BYTES);
  const value: FrameReply = { payload, used, frames, hashes: joined, zeros };
  return { value, transfer: [payload, joined.buffer] };
}

/** Memory that raw data can be read into: as much as there are units at a time. */
const idleMemory: Buffer[] = [];

function takeMemory(length: number): Buffer {
  const memory = idleMemory.pop();
  return memory !== undefined && memory.length >= length ? memory : Buffer.allocUnsafeSlow(length);
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

function close(): ThreadResult {
  for (const connection of connections) connection.close();
  return { value: undefined };
}

serveThread({ open, reopen, descriptors, greet, read, close });
