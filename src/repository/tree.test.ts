import { describe, expect, it } from "vitest";
import {
  childrenOf,
  currentPoint,
  dependentsOf,
  diskChain,
  pointChain,
  rootsOf,
  sortPoints,
  type PointNode,
} from "./tree.js";

function node(id: string, parent: string | null, disks: Record<string, string | null>): PointNode {
  return { id, parent, disks: Object.entries(disks).map(([token, below]) => ({ token, parent: below })) };
}

/** a <- b <- c <- d; disk y went full at c; e branches from b. */
const POINTS = [
  node("c", "b", { x: "b", y: null }),
  node("a", null, { x: null, y: null }),
  node("d", "c", { x: "c", y: "c" }),
  node("b", "a", { x: "a", y: "a" }),
  node("e", "b", { x: "b", y: "b" }),
];

const ids = (points: readonly PointNode[]): string => points.map((point) => point.id).join("");

describe("tree of points", () => {
  it("sortPoints() puts the oldest first", () => {
    expect(ids(sortPoints(POINTS))).toBe("abcde");
  });
  it("currentPoint() is the newest, whatever its branch", () => {
    expect(currentPoint(POINTS)?.id).toBe("e");
    expect(currentPoint<PointNode>([])).toBeUndefined();
  });
  it("rootsOf() finds points without a parent, and those whose parent is not there", () => {
    expect(ids(rootsOf(POINTS))).toBe("a");
    expect(ids(rootsOf(POINTS.filter((point) => point.id !== "b")))).toBe("ace");
  });
  it("childrenOf() finds all branches", () => {
    expect(ids(childrenOf(POINTS, "b"))).toBe("ce");
  });
  it("diskChain() goes down to the disk's full image, each disk its own way", () => {
    expect(ids(diskChain(POINTS, "d", "x"))).toBe("dcba");
    expect(ids(diskChain(POINTS, "d", "y"))).toBe("dc");
    expect(ids(diskChain(POINTS, "d", "z"))).toBe("");
  });
  it("diskChain() ends where a point is missing, and at a cycle", () => {
    expect(
      ids(
        diskChain(
          POINTS.filter((point) => point.id !== "b"),
          "d",
          "x",
        ),
      ),
    ).toBe("dc");
    expect(ids(diskChain([node("a", null, { x: "b" }), node("b", null, { x: "a" })], "a", "x"))).toBe("ab");
  });
  it("pointChain() holds what any disk needs, newest first", () => {
    expect(ids(pointChain(POINTS, "d"))).toBe("dcba");
    expect(ids(pointChain(POINTS, "a"))).toBe("a");
  });
  it("dependentsOf() finds all points that need an image, on all branches", () => {
    expect(ids(dependentsOf(POINTS, "b", "x"))).toBe("bcde");
    expect(ids(dependentsOf(POINTS, "b", "y"))).toBe("be");
    expect(ids(dependentsOf(POINTS, "d", "x"))).toBe("d");
  });
  it("dependentsOf() finds them below a point that is missing itself", () => {
    expect(
      ids(
        dependentsOf(
          POINTS.filter((point) => point.id !== "b"),
          "b",
          "x",
        ),
      ),
    ).toBe("cde");
  });
});
