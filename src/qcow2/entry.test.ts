import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  decodeL1Entry,
  decodeL2Entry,
  encodeCompressedEntry,
  encodeL1Entry,
  encodeZeroEntries,
  sectorsOf,
} from "./entry.js";

function table(...entries: bigint[]): Buffer {
  const bytes = Buffer.alloc(entries.length * 8);
  for (const [index, entry] of entries.entries()) bytes.writeBigUInt64BE(entry, index * 8);
  return bytes;
}

describe("decodeL2Entry()", () => {
  it("tells an explicit zero cluster from an unallocated one", () => {
    const bytes = table(0n, 1n, 0x8000_0000_0005_0001n);
    expect(decodeL2Entry(bytes, 0, 16, 3)).toEqual({ kind: "unallocated" });
    expect(decodeL2Entry(bytes, 1, 16, 3)).toEqual({ kind: "zero" });
    expect(decodeL2Entry(bytes, 2, 16, 3)).toEqual({ kind: "zero" });
    expect(decodeL2Entry(bytes, 1, 16, 2)).toMatchObject({ kind: "invalid" });
  });

  it("takes bits 9 to 55 as the offset of a standard cluster", () => {
    expect(decodeL2Entry(table(0x80ff_ffff_ffff_fe00n), 0, 9, 3)).toEqual({
      kind: "plain",
      at: Number(0x00ff_ffff_ffff_fe00n),
    });
    expect(decodeL2Entry(table(0x8000_0000_0000_0200n), 0, 9, 3)).toEqual({ kind: "plain", at: 0x200 });
  });

  it.each([
    ["a reserved low bit", 0x8000_0000_0005_0002n],
    ["a reserved high bit", 0x8100_0000_0005_0000n],
    ["an offset inside a cluster", 0x8000_0000_0005_0200n],
    ["bit 63 alone", 0x8000_0000_0000_0000n],
    ["bit 63 on a compressed cluster", 0xc000_0000_0005_0000n],
  ])("refuses %s", (_, entry) => {
    expect(decodeL2Entry(table(entry), 0, 16, 3).kind).toBe("invalid");
  });

  it("refuses a compressed offset beyond bit 55 where clusters are small", () => {
    // cluster_bits 9: x = 61, so bits 56 to 60 belong to the offset and must be 0.
    expect(decodeL2Entry(table(0x4100_0000_0000_0000n), 0, 9, 3).kind).toBe("invalid");
    expect(decodeL2Entry(table(0x40ff_ffff_ffff_ffffn), 0, 9, 3)).toMatchObject({
      kind: "compressed",
      sectors: 1,
    });
  });
});

describe("encodeCompressedEntry()", () => {
  it("writes the descriptor of the specification, written out in bigint arithmetic", () => {
    const cases = fc.record({
      clusterBits: fc.integer({ min: 12, max: 21 }),
      at: fc.integer({ min: 0, max: 2 ** 49 - 1 }),
      length: fc.integer({ min: 1, max: 2 ** 12 }),
    });
    fc.assert(
      fc.property(cases, ({ clusterBits, at, length }) => {
        const bytes = Buffer.alloc(16);
        encodeCompressedEntry(bytes, 1, clusterBits, at, length);
        const x = BigInt(62 - (clusterBits - 8));
        const additional = (BigInt(at) + BigInt(length) - 1n) / 512n - BigInt(at) / 512n;
        expect(bytes.readBigUInt64BE(8)).toBe((1n << 62n) | (additional << x) | BigInt(at));
        expect(bytes.readBigUInt64BE(0)).toBe(0n);
        expect(decodeL2Entry(bytes, 1, clusterBits, 3)).toEqual({
          kind: "compressed",
          at,
          sectors: sectorsOf(at, length),
        });
      }),
    );
  });
});

describe("encodeZeroEntries()", () => {
  it("sets bit 0 of the entries given and of no others", () => {
    const bytes = Buffer.alloc(32);
    encodeZeroEntries(bytes, 1, 2);
    expect(bytes.equals(table(0n, 1n, 1n, 0n))).toBe(true);
  });
});

describe("decodeL1Entry()", () => {
  it("reads what encodeL1Entry() wrote, with bit 63 set in the file", () => {
    const bytes = Buffer.alloc(8);
    encodeL1Entry(bytes, 0, 0x00ab_cdef_0000);
    expect(bytes.readBigUInt64BE()).toBe(0x8000_00ab_cdef_0000n);
    expect(decodeL1Entry(bytes, 0)).toBe(0x00ab_cdef_0000);
  });

  it("knows no table for an entry of 0 and refuses reserved bits", () => {
    expect(decodeL1Entry(table(0n), 0)).toBe(0);
    expect(decodeL1Entry(table(0x8000_0000_0001_0001n), 0)).toBeNaN();
    expect(decodeL1Entry(table(0x8100_0000_0001_0000n), 0)).toBeNaN();
  });
});
