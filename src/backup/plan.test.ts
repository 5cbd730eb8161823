import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { totalLength, type Extent } from "../extent/index.js";
import { packUnits, planRange, type RangeFacts } from "./plan.js";

const CLUSTER = 4;
const shape = { virtualSize: 30, clusterSize: CLUSTER };
const whole = { offset: 0, length: 30 };

function has(extents: readonly Extent[], byte: number): boolean {
  return extents.some(({ offset, length }) => byte >= offset && byte < offset + length);
}

const extents = fc.array(fc.record({ offset: fc.nat(29), length: fc.nat(10) }), { maxLength: 5 });

describe("planRange()", () => {
  it("reads all but whole zero clusters in a full, and stores no zeroes", () => {
    const facts: RangeFacts = {
      dirty: undefined,
      zero: [
        { offset: 3, length: 10 },
        { offset: 28, length: 2 },
      ],
      parentData: [],
    };
    const plan = planRange(whole, facts, shape);
    expect(plan).toEqual({
      read: [
        { offset: 0, length: 4 },
        { offset: 12, length: 16 },
      ],
      zero: [],
    });
  });

  it("covers the parent's data where the disk reads as zero, dirty or not", () => {
    const facts: RangeFacts = {
      dirty: [],
      zero: [{ offset: 8, length: 22 }],
      parentData: [{ offset: 13, length: 1 }],
    };
    expect(planRange(whole, facts, shape)).toEqual({ read: [], zero: [{ offset: 12, length: 4 }] });
  });

  it("decides right for every cluster, whatever the maps say", () => {
    fc.assert(
      fc.property(fc.option(extents, { nil: undefined }), extents, extents, (dirty, zero, parentData) => {
        const plan = planRange(whole, { dirty, zero, parentData }, shape);
        for (let start = 0; start < 30; start += CLUSTER) {
          const bytes = [...Array(Math.min(CLUSTER, 30 - start)).keys()].map((index) => start + index);
          const isZero = bytes.every((byte) => has(zero, byte));
          const isDirty = dirty === undefined || bytes.some((byte) => has(dirty, byte));
          const isHeld = bytes.some((byte) => has(parentData, byte));
          expect(bytes.every((byte) => has(plan.read, byte) === (isDirty && !isZero))).toBe(true);
          // Where nobody knows what changed, zeroes are stored over data only.
          const isCovered = isZero && ((dirty !== undefined && isDirty) || isHeld);
          expect(bytes.every((byte) => has(plan.zero, byte) === isCovered)).toBe(true);
        }
      }),
    );
  });
});

describe("packUnits()", () => {
  it("keeps every byte in order, no unit above its size", () => {
    const list = [
      { offset: 0, length: 8 },
      { offset: 12, length: 20 },
      { offset: 40, length: 2 },
    ];
    const units = [...packUnits(list, 8)];
    expect(units.flat().reduce((sum, { length }) => sum + length, 0)).toBe(30);
    expect(units.every((unit) => totalLength(unit) <= 8)).toBe(true);
    expect(units).toEqual([
      [{ offset: 0, length: 8 }],
      [{ offset: 12, length: 8 }],
      [{ offset: 20, length: 8 }],
      [
        { offset: 28, length: 4 },
        { offset: 40, length: 2 },
      ],
    ]);
  });
});
