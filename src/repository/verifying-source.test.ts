import { createHash, randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import type { ByteSource } from "../bytes/index.js";
import type { Segment } from "../qcow2/index.js";
import { VerifyingSource } from "./verifying-source.js";

class CountingSource implements ByteSource {
  readonly reads: string[] = [];
  readonly bytes: Buffer;
  constructor(bytes: Buffer) {
    this.bytes = bytes;
  }
  get length(): number {
    return this.bytes.length;
  }
  read(offset: number, length: number): Promise<Buffer> {
    this.reads.push(`${offset}+${length}`);
    return Promise.resolve(Buffer.from(this.bytes.subarray(offset, offset + length)));
  }
}

function segmentOf(bytes: Buffer, offset: number, length: number, kind: Segment["kind"]): Segment {
  const sha256 = createHash("sha256")
    .update(bytes.subarray(offset, offset + length))
    .digest("hex");
  return { offset, length, sha256, kind };
}

/** Header 0..1000, frames ..50000, tables ..250000, frames ..300000. */
function sample(): { bytes: Buffer; source: CountingSource; verifying: VerifyingSource } {
  const bytes = randomBytes(300_000);
  const source = new CountingSource(bytes);
  const segments = [
    segmentOf(bytes, 1000, 49_000, "data"),
    segmentOf(bytes, 50_000, 200_000, "table"),
    segmentOf(bytes, 250_000, 50_000, "data"),
    segmentOf(bytes, 0, 1000, "header"),
  ];
  const verifying = new VerifyingSource(source, segments, (what) => Promise.resolve(new Error(what)));
  return { bytes, source, verifying };
}

describe("VerifyingSource", () => {
  it("returns the bytes of any range, across segments too", async () => {
    const { bytes, verifying } = sample();
    for (const [offset, length] of [
      [0, 300_000],
      [0, 0],
      [300_000, 0],
      [999, 2],
      [49_999, 2],
      [115_535, 2],
      [249_999, 2],
      [60_000, 131_073],
      [299_999, 1],
    ] as const) {
      expect((await verifying.read(offset, length)).equals(bytes.subarray(offset, offset + length))).toBe(
        true,
      );
    }
  });

  it("reads nothing past the end", async () => {
    const { verifying } = sample();
    await expect(verifying.read(299_999, 2)).rejects.toThrow("it has 300000 bytes");
    await expect(verifying.read(-1, 2)).rejects.toThrow("it has 300000 bytes");
  });

  it.each([0, 999, 50_000, 115_535, 200_000, 249_999])(
    "notices a wrong byte %i wherever in its segment one reads",
    async (at) => {
      const { source, verifying } = sample();
      source.bytes[at]! ^= 1;
      const [start, end] = at < 1000 ? [0, 999] : [50_000, 249_999];
      const told = new RegExp(`in bytes ${start} to ${end} differs`);
      await expect(verifying.read(start, 1)).rejects.toThrow(told);
      await expect(verifying.read(end, 1)).rejects.toThrow(told);
      source.bytes[at]! ^= 1;
      expect(await verifying.read(start, 1)).toHaveLength(1);
    },
  );

  it("notices bytes that change after the segment was verified", async () => {
    const { source, verifying } = sample();
    await verifying.read(50_000, 10);
    source.bytes[120_000]! ^= 1;
    expect(await verifying.read(50_000, 10)).toHaveLength(10);
    await expect(verifying.read(119_000, 10)).rejects.toThrow("changed while it was read");
  });

  it("digests a segment once, then reads pieces of it alone", async () => {
    const { source, verifying } = sample();
    await Promise.all([verifying.read(50_000, 10), verifying.read(200_000, 10)]);
    expect(source.reads).toHaveLength(4 + 2);
    source.reads.length = 0;
    await verifying.read(60_000, 10);
    expect(source.reads).toEqual(["50000+65536"]);
  });

  it("never takes frames for tables", async () => {
    const { bytes, source, verifying } = sample();
    const { tables } = verifying;
    await expect(tables.read(1000, 10)).rejects.toThrow("at byte 1000, where frames are stored");
    await expect(tables.read(249_990, 20)).rejects.toThrow("where frames are stored");
    expect(tables.length).toBe(verifying.length);
    expect((await tables.read(60_000, 10)).equals(bytes.subarray(60_000, 60_010))).toBe(true);
    source.reads.length = 0;
    expect((await verifying.read(1000, 10)).equals(bytes.subarray(1000, 1010))).toBe(true);
    expect(source.reads).toEqual(["1000+10"]);
  });

  it("ends with the reason of an abort", async () => {
    const { verifying } = sample();
    const reason = new Error("interrupted");
    await expect(verifying.read(0, 1, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });
});
