import { createHash } from "node:crypto";
import { describe, expect, it } from "vitest";
import { encodeBatch, IDENTITY, MemoryImage } from "../../test/support/qcow2.js";
import { KiB, MiB, TiB, type HeadLastSink } from "../bytes/index.js";
import { deferred } from "../flow/index.js";
import { ImageReader, ImageWriter, type ImageWriterOptions } from "./index.js";

const CLUSTER = 4 * KiB;
const OPTIONS: ImageWriterOptions = { virtualSize: 16 * MiB, clusterSize: CLUSTER, identity: IDENTITY };

function cluster(fill: number): Buffer {
  return Buffer.alloc(CLUSTER, fill);
}

describe("ImageWriter.create()", () => {
  it.each<[string, Partial<ImageWriterOptions>]>([
    ["a size that is not a multiple of 512", { virtualSize: 513 }],
    ["a negative size", { virtualSize: -512 }],
    ["clusters of 3 KiB", { clusterSize: 3 * KiB }],
    ["clusters of 2 KiB", { clusterSize: 2 * KiB }],
    ["clusters of 4 MiB", { clusterSize: 4 * MiB }],
    ["an L1 table above 32 MiB", { virtualSize: 16 * TiB }],
    ["an empty backing name", { backing: { file: "", format: "qcow2" } }],
    ["a backing name of 1,024 bytes", { backing: { file: "b".repeat(1024), format: "qcow2" } }],
    ["segments of no bytes", { segmentBytes: 0 }],
  ])("refuses %s", (_, options) => {
    expect(() => ImageWriter.create(new MemoryImage(CLUSTER), { ...OPTIONS, ...options })).toThrow(
      expect.objectContaining({ code: "TM_USAGE" }),
    );
  });
});

describe("ImageWriter.extend()", () => {
  it("takes an image of more segments than a call has room for arguments", async () => {
    const count = 262_144;
    const segments = Array.from({ length: count }, (_, index) => ({
      ...{ offset: CLUSTER * (index + 1), length: CLUSTER, sha256: "0".repeat(64), kind: "data" as const },
    }));
    const base = { segments, length: CLUSTER * (count + 1) };
    const writer = ImageWriter.extend(new MemoryImage(CLUSTER), OPTIONS, base);
    let known: readonly unknown[] = [];
    const beforeCommit = (summary: { readonly segments: readonly unknown[] }): Promise<void> => {
      known = summary.segments;
      return Promise.reject(new Error("enough"));
    };
    await expect(writer.finish({ beforeCommit })).rejects.toThrow("enough");
    expect(known.slice(0, count)).toEqual(segments);
  });
});

describe("ImageWriter.append()", () => {
  it.each<[string, (writer: ImageWriter) => unknown]>([
    ["a cluster beyond the disk", (writer) => writer.append(encodeBatch([[4096, cluster(1)]]))],
    ["a cluster that was written", (writer) => writer.append(encodeBatch([[1, cluster(1)]]))],
    ["a cluster that is zero", (writer) => writer.append(encodeBatch([[2, cluster(1)]]))],
    [
      "a cluster twice in one batch",
      (writer) =>
        writer.append(
          encodeBatch([
            [9, cluster(1)],
            [9, cluster(2)],
          ]),
        ),
    ],
    [
      "a cluster below the seal",
      async (writer) => {
        await writer.seal(600);
        await writer.append(encodeBatch([[599, cluster(1)]]));
      },
    ],
    [
      "lengths that are not the payload's",
      (writer) => {
        const { payload, frames } = encodeBatch([[5, cluster(1)]]);
        return writer.append({ payload: Buffer.concat([payload, payload]), frames });
      },
    ],
    [
      "what is no frame",
      (writer) => writer.append({ payload: cluster(0xaa), frames: [{ cluster: 5, length: CLUSTER }] }),
    ],
    [
      "a frame without a checksum",
      (writer) => {
        const { payload, frames } = encodeBatch([[5, cluster(1)]]);
        payload[4]! &= ~0b100;
        return writer.append({ payload, frames });
      },
    ],
    ["a zero cluster beyond the disk", (writer) => writer.zero(4095, 2)],
    ["a zero cluster that was written", (writer) => writer.zero(0, 3)],
  ])("refuses %s, and so does everything after it", async (_, step) => {
    const sink = new MemoryImage(CLUSTER);
    const writer = ImageWriter.create(sink, OPTIONS);
    await writer.append(encodeBatch([[1, cluster(7)]]));
    writer.zero(2, 1);
    const refusal = { code: "TM_IMAGE_WRITE" };
    await expect(
      (async () => {
        await step(writer);
      })(),
    ).rejects.toMatchObject(refusal);
    await expect(writer.append(encodeBatch([[20, cluster(1)]]))).rejects.toMatchObject(refusal);
    await expect(writer.finish()).rejects.toMatchObject(refusal);
    await writer.abort();
    expect(sink.state).toBe("aborted");
  });

  it("serves concurrent calls in their order, one at a time, as fast as the sink takes them", async () => {
    const memory = new MemoryImage(CLUSTER);
    const gates = [deferred<undefined>(), deferred<undefined>(), deferred<undefined>()];
    const taken: number[] = [];
    const sink: HeadLastSink = {
      append: async (bytes) => {
        const gate = gates[taken.length];
        taken.push(bytes.length);
        await gate?.promise;
        await memory.append(bytes);
      },
      commit: (head) => memory.commit(head),
      abort: () => memory.abort(),
    };
    const writer = ImageWriter.create(sink, OPTIONS);
    const batches = [3, 1, 2].map((number) => encodeBatch([[number, cluster(number)]]));
    const done: number[] = [];
    const appends = batches.map((batch, index) => writer.append(batch).then(() => done.push(index)));
    for (const [index, gate] of gates.entries()) {
      await new Promise(setImmediate);
      expect([taken.length, done.length]).toEqual([index + 1, index]);
      gate.resolve(undefined);
    }
    await Promise.all(appends);
    expect(done).toEqual([0, 1, 2]);
    expect(taken).toEqual(batches.map((batch) => batch.payload.length));
    await writer.finish();
    const stored = Buffer.concat(batches.map((batch) => batch.payload));
    expect(memory.bytes.subarray(CLUSTER, CLUSTER + stored.length).equals(stored)).toBe(true);
  });

  it("fails with the sink's error, then and afterwards", async () => {
    const failure = new Error("no space left");
    const memory = new MemoryImage(CLUSTER);
    const sink: HeadLastSink = {
      append: () => Promise.reject(failure),
      commit: (head) => memory.commit(head),
      abort: () => memory.abort(),
    };
    const writer = ImageWriter.create(sink, OPTIONS);
    await expect(writer.append(encodeBatch([[0, cluster(1)]]))).rejects.toBe(failure);
    await expect(writer.finish()).rejects.toBe(failure);
    await writer.abort();
    expect(memory.state).toBe("aborted");
  });
});

describe("ImageWriter.seal()", () => {
  it("lets complete L2 tables leave at once when they make up a segment", async () => {
    const sink = new MemoryImage(CLUSTER);
    const writer = ImageWriter.create(sink, { ...OPTIONS, segmentBytes: 2 * CLUSTER });
    writer.zero(0, 512 * 4);
    await writer.seal(511);
    expect(sink.length).toBe(CLUSTER);
    await writer.seal(512 * 2 - 1); // one table: not a segment yet
    expect(sink.length).toBe(CLUSTER);
    await writer.seal(512 * 4);
    expect(sink.length).toBe(5 * CLUSTER);
    const summary = await writer.finish();
    expect(summary.segments.map(({ kind, length }) => [kind, length / CLUSTER])).toEqual([
      ...[
        ["table", 2],
        ["table", 2],
        ["table", 2],
        ["table", 1],
        ["header", 1],
      ],
    ]);
  });

  it("keeps tables until the open data segment has its length, and pads it only when four segments wait", async () => {
    const segmentBytes = 4 * CLUSTER;
    const sink = new MemoryImage(CLUSTER);
    const writer = ImageWriter.create(sink, { ...OPTIONS, virtualSize: 64 * MiB, segmentBytes });
    const batch = encodeBatch([[0, cluster(1)]]);
    await writer.append(batch);
    writer.zero(512, 512 * 31);
    await writer.seal(512 * 15);
    expect(sink.length).toBe(CLUSTER + batch.payload.length);
    await writer.seal(512 * 16);
    // 4 * 5 / 8 clusters of data, padded to 3, and 16 tables.
    expect(sink.length).toBe(CLUSTER + 3 * CLUSTER + 16 * CLUSTER);
    const { segments } = await writer.finish();
    expect(segments[0]).toMatchObject({ kind: "data", offset: CLUSTER, length: 3 * CLUSTER });
  });
});

describe("ImageWriter.finish()", () => {
  it("returns the segments of the file with their digests", async () => {
    const sink = new MemoryImage(CLUSTER);
    const writer = ImageWriter.create(sink, OPTIONS);
    await writer.append(
      encodeBatch([
        [1, cluster(7)],
        [0, cluster(8)],
      ]),
    );
    writer.zero(2, 5);
    const summary = await writer.finish();
    expect(sink.state).toBe("committed");
    expect(summary).toMatchObject({ length: sink.length, dataClusters: 2, zeroClusters: 5 });
    expect(summary.segments.map((segment) => segment.kind)).toEqual(["data", "table", "header"]);
    for (const { offset, length, sha256 } of summary.segments) {
      expect(
        createHash("sha256")
          .update(sink.bytes.subarray(offset, offset + length))
          .digest("hex"),
      ).toBe(sha256);
    }
  });

  it("writes what the reader says about the image", async () => {
    const sink = new MemoryImage(CLUSTER);
    const backing = { file: "../p/vda.qcow2", format: "qcow2" } as const;
    const writer = ImageWriter.create(sink, { ...OPTIONS, backing });
    await writer.finish();
    expect(await ImageReader.open(sink)).toMatchObject({
      virtualSize: 16 * MiB,
      clusterSize: CLUSTER,
      backingFile: "../p/vda.qcow2",
      backingFormat: "qcow2",
      identity: IDENTITY,
      compression: "zstd",
    });
  });

  it("takes no call afterwards, and leaves the image through an abort", async () => {
    const sink = new MemoryImage(CLUSTER);
    const writer = ImageWriter.create(sink, OPTIONS);
    await writer.finish();
    await expect(writer.finish()).rejects.toThrow(/finished or aborted/);
    await expect(writer.append(encodeBatch([[0, cluster(1)]]))).rejects.toThrow(/finished or aborted/);
    expect(() => writer.zero(0, 1)).toThrow(/finished or aborted/);
    await writer.abort();
    expect(sink.state).toBe("committed");
  });
});
