import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { chop, intersect, normalize, subtract, totalLength, union, widen, type Extent } from "./index.js";

const SIZE = 64;

/** The extents as a set of bytes: the model that the laws are held against. */
function bytesOf(extents: readonly Extent[]): Set<number> {
  const bytes = new Set<number>();
  for (const { offset, length } of extents)
    for (let at = offset; at < offset + length; at += 1) bytes.add(at);
  return bytes;
}

const anyExtents = fc.array(fc.record({ offset: fc.nat(SIZE), length: fc.nat(12) }), { maxLength: 8 });
const canonical = anyExtents.map(normalize);

function isCanonical(extents: readonly Extent[]): boolean {
  return extents.every((extent, index) => {
    const previous = extents[index - 1];
    return extent.length > 0 && (previous === undefined || extent.offset > previous.offset + previous.length);
  });
}

describe("extent", () => {
  it("normalize() keeps the bytes and gives the canonical form", () => {
    fc.assert(
      fc.property(anyExtents, (extents) => {
        expect(bytesOf(normalize(extents))).toEqual(bytesOf(extents));
        expect(isCanonical(normalize(extents))).toBe(true);
      }),
    );
  });

  it("union(), intersect() and subtract() agree with sets of bytes", () => {
    fc.assert(
      fc.property(canonical, canonical, (a, b) => {
        const [x, y] = [bytesOf(a), bytesOf(b)];
        expect(bytesOf(union(a, b))).toEqual(new Set([...x, ...y]));
        expect(bytesOf(intersect(a, b))).toEqual(new Set([...x].filter((byte) => y.has(byte))));
        expect(bytesOf(subtract(a, b))).toEqual(new Set([...x].filter((byte) => !y.has(byte))));
      }),
    );
  });

  it("widen() covers what it was given with whole clusters and ends at the disk's end", () => {
    fc.assert(
      fc.property(canonical, fc.constantFrom(1, 2, 4, 8), (extents, cluster) => {
        const size = SIZE + 16 - 3;
        const wide = widen(extents, cluster, size);
        expect(isCanonical(wide)).toBe(true);
        const clusters = new Set([...bytesOf(extents)].map((byte) => Math.floor(byte / cluster)));
        const expected = [...Array(size).keys()].filter((byte) => clusters.has(Math.floor(byte / cluster)));
        expect([...bytesOf(wide)].sort((a, b) => a - b)).toEqual(expected);
      }),
    );
  });

  it("chop() keeps bytes and order, no piece longer than asked", () => {
    fc.assert(
      fc.property(canonical, fc.integer({ min: 1, max: 9 }), (extents, length) => {
        const pieces = [...chop(extents, length)];
        expect(bytesOf(pieces)).toEqual(bytesOf(extents));
        expect(pieces.every((piece) => piece.length <= length)).toBe(true);
        expect(totalLength(pieces)).toBe(totalLength(extents));
      }),
    );
  });
});
