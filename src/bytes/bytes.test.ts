import { describe, expect, it } from "vitest";
import { ByteReader, ByteWriter, formatSize, isZero, parseSize, roundDown, roundUp, TiB } from "./index.js";

describe("cursors", () => {
  it("ByteReader reads what ByteWriter writes, big-endian", () => {
    const buffer = new ByteWriter(20)
      .u8(1)
      .u16(0x0203)
      .u32(0x04050607)
      .u64(0x08090a0b0c0d0e0fn)
      .bytes("hi")
      .skip(3)
      .finish();
    expect(buffer.toString("hex")).toBe("0102030405060708090a0b0c0d0e0f6869000000");
    const reader = new ByteReader(buffer);
    expect([reader.u8(), reader.u16(), reader.u32(), reader.u64()]).toEqual([
      1,
      0x0203,
      0x04050607,
      0x08090a0b0c0d0e0fn,
    ]);
    expect(reader.text(2)).toBe("hi");
    expect(reader.skip(3).remaining).toBe(0);
  });

  it("ByteWriter refuses a structure that is not filled exactly", () => {
    expect(() => new ByteWriter(4).u16(1).finish()).toThrow(RangeError);
    expect(() => new ByteWriter(1).u16(1)).toThrow(RangeError);
    expect(() => new ByteWriter(1).bytes("ab")).toThrow(RangeError);
  });

  it("ByteReader refuses to read past the end, and sizes beyond a safe integer", () => {
    expect(() => new ByteReader(Buffer.alloc(3)).u32()).toThrow(RangeError);
    expect(() => new ByteReader(Buffer.alloc(8, 0xff)).size64()).toThrow(RangeError);
  });
});

describe("isZero()", () => {
  it.each([0, 1, 65_535, 65_536, 65_537, 200_000])("finds a single set byte anywhere in %d bytes", (size) => {
    const bytes = Buffer.alloc(size);
    expect(isZero(bytes)).toBe(true);
    for (const at of [0, Math.floor(size / 2), size - 1]) {
      if (at < 0 || at >= size) continue;
      bytes[at] = 1;
      expect(isZero(bytes)).toBe(false);
      bytes[at] = 0;
    }
  });
});

describe("sizes", () => {
  it.each([
    ["0", 0],
    ["512", 512],
    ["64K", 65_536],
    ["64KiB", 65_536],
    ["64kb", 65_536],
    ["1.5M", 1_572_864],
    ["2 GiB", 2_147_483_648],
    ["16T", 16 * TiB],
  ])("parseSize() reads %j", (text, bytes) => {
    expect(parseSize(text)).toBe(bytes);
  });

  it.each(["", "-1", "x", "1X", "1.0001K", "99999999T", "1 2", "0x10"])("parseSize() refuses %j", (text) => {
    expect(parseSize(text)).toBeUndefined();
  });

  it.each([
    [0, "0 B"],
    [999, "999 B"],
    [65_536, "64.0 KiB"],
    [1.5 * 1024 ** 3, "1.50 GiB"],
    [1024 ** 4, "1.00 TiB"],
  ])("formatSize() writes %d", (bytes, text) => {
    expect(formatSize(bytes)).toBe(text);
  });

  it("roundUp() and roundDown() are exact for large offsets", () => {
    expect(roundUp(16 * TiB - 1, 65_536)).toBe(16 * TiB);
    expect(roundDown(16 * TiB + 65_535, 65_536)).toBe(16 * TiB);
  });
});
