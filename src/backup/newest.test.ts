import { describe, expect, it } from "vitest";
import type { PointManifest, UnreadablePoint } from "../repository/index.js";
import { newestIdOf, precedingPoint } from "./newest.js";

const points = (...ids: string[]): PointManifest[] => ids.map((id) => ({ id }) as PointManifest);
const unreadable = (...ids: string[]): UnreadablePoint[] => ids.map((id) => ({ id }) as UnreadablePoint);

describe("newestIdOf()", () => {
  it("takes the newest of all points, readable or not, and of either alone", () => {
    expect(newestIdOf({ points: points("a", "b"), unreadable: [] })).toBe("b");
    expect(newestIdOf({ points: points("a", "b"), unreadable: unreadable("c") })).toBe("c");
    expect(newestIdOf({ points: points("b", "c"), unreadable: unreadable("a") })).toBe("c");
    expect(newestIdOf({ points: [], unreadable: unreadable("a") })).toBe("a");
    expect(newestIdOf({ points: [], unreadable: [] })).toBeUndefined();
  });
});

describe("precedingPoint()", () => {
  it("is the newest point that a disk goes on from; where none tells, the newest", () => {
    const before = (...continues: (string | undefined)[]) =>
      precedingPoint(
        continues.map((id) => ({ continues: id })),
        points("a", "b", "c"),
      )?.id;
    expect(before("a")).toBe("a");
    expect(before("a", undefined, "b")).toBe("b");
    expect(before(undefined)).toBe("c");
    expect(before("gone")).toBe("c");
    expect(precedingPoint([], points()) === undefined).toBe(true);
  });
});
