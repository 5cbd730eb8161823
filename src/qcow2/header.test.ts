import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { decodeHeader, encodeHeader, HEADER_LENGTH, type Header } from "./header.js";
import { ImageDamageError, UnsupportedImageError } from "./errors.js";

const HEADER: Header = {
  version: 3,
  backingFileOffset: 0x1b0,
  backingFileSize: 11,
  clusterBits: 16,
  size: 0x1_0000_0200,
  l1Size: 9,
  l1TableOffset: 0x30000,
  refcountTableOffset: 0x50000,
  refcountTableClusters: 2,
  refcountOrder: 4,
  headerLength: HEADER_LENGTH,
  compression: "zstd",
};

describe("encodeHeader()", () => {
  it("writes the table of the specification", () => {
    expect(encodeHeader(HEADER).toString("hex")).toBe(
      [
        ...["514649fb", "00000003", "00000000000001b0", "0000000b", "00000010", "0000000100000200"],
        ...["00000000", "00000009", "0000000000030000", "0000000000050000", "00000002", "00000000"],
        ...["0000000000000000", "0000000000000008", "0000000000000000", "0000000000000000"],
        ...["00000004", "00000070", "01", "00000000000000"],
      ].join(""),
    );
  });
});

describe("decodeHeader()", () => {
  it("reads what encodeHeader() wrote", () => {
    expect(decodeHeader(encodeHeader(HEADER), "x")).toEqual(HEADER);
    expect(decodeHeader(encodeHeader({ ...HEADER, compression: "zlib" }), "x").compression).toBe("zlib");
  });

  it("assumes the length and the refcount order of version 2", () => {
    const bytes = encodeHeader(HEADER).subarray(0, 72);
    bytes.writeUInt32BE(2, 4);
    expect(decodeHeader(bytes, "x")).toEqual({
      ...HEADER,
      version: 2,
      headerLength: 72,
      compression: "zlib",
    });
  });

  it.each<[string, number, number, new (...args: never[]) => Error]>([
    ["the magic", 0, 1, ImageDamageError],
    ["version 4", 4, 4, UnsupportedImageError],
    ["cluster_bits 8", 20, 8, ImageDamageError],
    ["cluster_bits 22", 20, 22, ImageDamageError],
    ["crypt_method 1", 32, 1, UnsupportedImageError],
    ["a backing name of 1,024 bytes", 16, 1024, ImageDamageError],
    ["a backing name that ends beyond the first cluster", 12, 0xfffa, ImageDamageError],
    ["a backing name inside the header", 12, 0x68, ImageDamageError],
    ["header_length 103", 100, 103, ImageDamageError],
    ["header_length 96", 100, 96, ImageDamageError],
    ["a header longer than its cluster", 100, 0x10008, ImageDamageError],
    ["refcount_order 7", 96, 7, ImageDamageError],
    ["a size above 2^53", 24, 0x00200000, ImageDamageError],
    ["the compression bit without a compression type", 104, 0, ImageDamageError],
    ["a compression type without its bit", 76, 0, ImageDamageError],
  ])("refuses %s", (_, at, value, error) => {
    const bytes = encodeHeader(HEADER);
    bytes.writeUInt32BE(value, at);
    expect(() => decodeHeader(bytes, "x")).toThrow(error);
  });

  it("ends in one of its own errors or in a header, whatever the bytes are", () => {
    const good = encodeHeader(HEADER);
    const flips = fc.array(fc.tuple(fc.nat(HEADER_LENGTH - 1), fc.nat(255)), { minLength: 1, maxLength: 4 });
    fc.assert(
      fc.property(flips, fc.nat(HEADER_LENGTH), (changes, cut) => {
        const bytes = Buffer.from(good);
        for (const [at, value] of changes) bytes[at] = value;
        for (const candidate of [bytes, bytes.subarray(0, cut)]) {
          let outcome: unknown;
          try {
            outcome = decodeHeader(candidate, "x").version;
          } catch (error) {
            outcome = error;
          }
          const isOwn = outcome instanceof ImageDamageError || outcome instanceof UnsupportedImageError;
          expect(isOwn || outcome === 2 || outcome === 3).toBe(true);
        }
      }),
      { numRuns: 1000 },
    );
  });
});
