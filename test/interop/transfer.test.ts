import { randomBytes } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { setImmediate as turn } from "node:timers/promises";
import { expect, describe, it } from "vitest";
import { copyDisk, measureCopy, UNIT_BYTES, type DiskCopy } from "../../src/backup/disk-copy.js";
import { DiskWriter } from "../../src/backup/disk-writer.js";
import { KiB, MiB, type HeadLastSink } from "../../src/bytes/index.js";
import { Budget, deferred, RateLimit } from "../../src/flow/index.js";
import { ImageChain, ImageReader, ImageWriter } from "../../src/qcow2/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import {
  FrameDecoder,
  FrameReader,
  STREAM_MEMORY,
  streamChain,
  type FrameExport,
} from "../../src/transfer/index.js";
import { checkImage, CLEAN, toRaw } from "../support/image.js";
import { startQemuNbd, type RealNbdServer } from "../support/nbd-servers.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";

const CLUSTER = 64 * KiB;
const identity = {
  point: "20261120T065009123Z-4f2a91",
  parent: null,
  machine: "m",
  disk: "d",
  token: "00c0ffee",
};

/** A disk with random, repetitive and zero parts, whose size is no multiple of the cluster. */
function mixedDisk(): Buffer {
  const disk = Buffer.alloc(20 * MiB + 512);
  randomBytes(5 * MiB).copy(disk, 1 * MiB);
  disk.fill("tidemark ", 8 * MiB, 12 * MiB);
  disk.fill(7, disk.length - 512);
  return disk;
}

function wholeDisk(virtualSize: number, writer: ImageWriter): DiskCopy {
  return {
    virtualSize,
    clusterSize: CLUSTER,
    export: 0,
    writer: new DiskWriter(writer, undefined),
    hashKey: undefined,
    storeZeroes: false,
    facts: () => Promise.resolve({ dirty: undefined, zero: [], parentData: [] }),
    onProgress: () => undefined,
  };
}

/** Serves the directory's raw disk. */
function serveDisk(directory: TemporaryDirectory): Promise<RealNbdServer> {
  const image = directory.file("disk.raw");
  return startQemuNbd({ image, format: "raw", exportName: "disk" });
}

/** What serves here is not hurt by a client that leaves. */
const UNGUARDED = { protect: () => Promise.resolve(), signal: new AbortController().signal };

function exportsOf({ address }: RealNbdServer): readonly FrameExport[] {
  return [{ disk: "d", address, exportName: "disk" }];
}

describe("transfer", () => {
  it("copyDisk() and streamChain() keep every byte, and qemu-img agrees", async () => {
    await using directory = await temporaryDirectory();
    const disk = mixedDisk();
    await writeFile(directory.file("disk.raw"), disk);
    await using server = await serveDisk(directory);
    const storage = await LocalStorage.open(directory.file("store"), { create: true });
    const writer = ImageWriter.create(await storage.create("disk.qcow2", { headLength: CLUSTER }), {
      virtualSize: disk.length,
      clusterSize: CLUSTER,
      identity,
    });
    const reader = await FrameReader.start(exportsOf(server), 2, UNGUARDED);
    const copy = wholeDisk(disk.length, writer);
    const signal = new AbortController().signal;
    await reader.greet(3);
    expect(await measureCopy(copy, signal)).toBe(disk.length);
    await copyDisk(copy, {
      reader,
      inFlight: new Budget(8 * MiB),
      bandwidth: new RateLimit(Infinity),
      signal,
    });
    await reader.close();
    await writer.finish();

    const path = directory.file("store/disk.qcow2");
    expect(await checkImage(path)).toMatchObject(CLEAN);
    expect((await readFile(await toRaw(path, "qcow2", directory.file("out.raw")))).equals(disk)).toBe(true);

    const source = await storage.open("disk.qcow2");
    const chain = ImageChain.of([await ImageReader.open(source)]);
    const decoder = FrameDecoder.start(2, STREAM_MEMORY);
    try {
      for (const range of [
        { offset: 0, length: disk.length },
        { offset: 3 * MiB + 777, length: 9 * MiB + 1 },
        { offset: disk.length - 100, length: 100 },
      ]) {
        const pieces: Buffer[] = [];
        for await (const window of streamChain(chain, range, decoder)) {
          for (const { bytes, length } of window)
            pieces.push(bytes === undefined ? Buffer.alloc(length) : Buffer.from(bytes));
        }
        expect(Buffer.concat(pieces).equals(disk.subarray(range.offset, range.offset + range.length))).toBe(
          true,
        );
      }
    } finally {
      await decoder.stop();
      await source.close();
    }
  });

  it("copyDisk() holds no more than its budget while the sink stalls", async () => {
    await using directory = await temporaryDirectory();
    const disk = randomBytes(24 * MiB);
    await writeFile(directory.file("disk.raw"), disk);
    await using server = await serveDisk(directory);
    const open = deferred<undefined>();
    const stalled = deferred<undefined>();
    const sink: HeadLastSink = {
      append: () => {
        stalled.resolve(undefined);
        return open.promise;
      },
      commit: () => Promise.resolve(),
      abort: () => Promise.resolve(),
    };
    const writer = ImageWriter.create(sink, { virtualSize: disk.length, clusterSize: CLUSTER, identity });
    const reader = await FrameReader.start(exportsOf(server), 2, UNGUARDED);
    await reader.greet(1);
    const limit = 3 * UNIT_BYTES;
    const inFlight = new Budget(limit);
    let done = 0;
    const copy = { ...wholeDisk(disk.length, writer), onProgress: (bytes: number) => (done = bytes) };
    const signal = new AbortController().signal;
    const copying = copyDisk(copy, { reader, inFlight, bandwidth: new RateLimit(Infinity), signal });
    await stalled.promise;
    for (let turns = 0; turns < 1000; turns += 1) await turn();
    expect(done).toBe(0);
    expect(inFlight.used).toBe(limit);
    open.resolve(undefined);
    await copying;
    expect(done).toBe(disk.length);
    expect(inFlight.peak).toBe(limit);
    expect(inFlight.used).toBe(0);
    await reader.close();
  });

  it("copyDisk() ends with the sink's error, nothing under way", async () => {
    await using directory = await temporaryDirectory();
    await writeFile(directory.file("disk.raw"), randomBytes(16 * MiB));
    await using server = await serveDisk(directory);
    const full = new Error("no space left");
    const sink: HeadLastSink = {
      append: () => Promise.reject(full),
      commit: () => Promise.resolve(),
      abort: () => Promise.resolve(),
    };
    const writer = ImageWriter.create(sink, { virtualSize: 16 * MiB, clusterSize: CLUSTER, identity });
    const reader = await FrameReader.start(exportsOf(server), 2, UNGUARDED);
    await reader.greet(1);
    const inFlight = new Budget(8 * MiB);
    const signal = new AbortController().signal;
    await expect(
      copyDisk(wholeDisk(16 * MiB, writer), { reader, inFlight, bandwidth: new RateLimit(Infinity), signal }),
    ).rejects.toThrow("no space left");
    expect(inFlight.used).toBe(0);
    await reader.close();
  });
});
