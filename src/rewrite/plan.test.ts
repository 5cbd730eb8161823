import { describe, expect, it } from "vitest";
import {
  descendantsOf,
  idleTombstones,
  planCompaction,
  planFlatten,
  planIdle,
  planRemoval,
  sharedPoints,
  type PlannedPoint,
  type StoredPoint,
} from "./plan.js";

/** "B<A:x<A,y" is point B after A, whose disk x is an increment of A's, and whose disk y is full. */
function points(...texts: readonly string[]): PlannedPoint[] {
  return texts.map((text) => {
    const [links = "", disks = "x"] = text.split(":");
    const [id = "", parent = null] = links.split("<");
    return {
      id,
      parent,
      disks: disks.split(",").map((disk) => {
        const [name = "", base = null] = disk.split("<");
        return { name, token: name, parent: base };
      }),
    };
  });
}

const CHAIN = points("A:x", "B<A:x<A", "C<B:x<B", "D<C:x<C");
const remove = (all: readonly PlannedPoint[], ...ids: readonly string[]): ReturnType<typeof planRemoval> =>
  planRemoval(all, new Set(ids));
const stacks = ({ merges }: ReturnType<typeof planRemoval>): string[] =>
  merges.map(({ point, disk, stack, parent }) => `${point}.${disk}=${stack.join("")}/${parent ?? "-"}`);

describe("planRemoval()", () => {
  it("moves what the oldest full holds into its child, which becomes full", () => {
    const plan = remove(CHAIN, "A");
    expect(stacks(plan)).toEqual(["B.x=BA/-"]);
    expect([...plan.reparented]).toEqual([["B", null]]);
    expect(plan.removed).toEqual(["A"]);
  });

  it("reparents the child of one in the middle", () => {
    const plan = remove(CHAIN, "B");
    expect(stacks(plan)).toEqual(["C.x=CB/A"]);
    expect([...plan.reparented]).toEqual([["C", "A"]]);
  });

  it("just lets a leaf go", () => {
    expect(remove(CHAIN, "D")).toEqual({ merges: [], reparented: new Map(), removed: ["D"] });
  });

  it("merges several at once, and lets the newest go first", () => {
    const plan = remove(CHAIN, "A", "B", "C");
    expect(stacks(plan)).toEqual(["D.x=DCBA/-"]);
    expect(plan.removed).toEqual(["C", "B", "A"]);
    expect(stacks(remove(CHAIN, "A", "C"))).toEqual(["B.x=BA/-", "D.x=DC/B"]);
  });

  it("gives each branch what the removed point held", () => {
    const branched = points("A:x", "B<A:x<A", "C<B:x<B", "D<B:x<B");
    expect(stacks(remove(branched, "B"))).toEqual(["C.x=CB/A", "D.x=DB/A"]);
    expect([...remove(branched, "B").reparented]).toEqual([
      ["C", "A"],
      ["D", "A"],
    ]);
  });

  it("goes by each disk's own chain: some go on elsewhere, some are full, some were not there", () => {
    const mixed = points("A:x,y,z", "B<A:x<A,y,z<A", "C<B:x<B,y<B,z<A");
    expect(stacks(remove(mixed, "B"))).toEqual(["C.x=CB/A", "C.y=CB/-"]);
    expect(stacks(remove(mixed, "A"))).toEqual(["B.x=BA/-", "B.z=BA/-", "C.z=CA/-"]);
  });

  it("reparents a point whose images need nothing of the removed one", () => {
    const plan = remove(points("A:x", "B<A:x"), "A");
    expect(plan.merges).toEqual([]);
    expect([...plan.reparented]).toEqual([["B", null]]);
  });

  it("has nothing to merge when everything goes", () => {
    expect(remove(CHAIN, "A", "B", "C", "D")).toEqual({
      merges: [],
      reparented: new Map(),
      removed: ["D", "C", "B", "A"],
    });
  });
});

describe("planFlatten()", () => {
  it("merges an image with all below it, and leaves full ones", () => {
    const mixed = points("A:x,y", "B<A:x<A,y<A", "C<B:x<B,y");
    expect(planFlatten(mixed, "C")).toEqual([
      { point: "C", disk: "x", token: "x", stack: ["C", "B", "A"], parent: null },
    ]);
    expect(planFlatten(mixed, "A")).toEqual([]);
  });
});

describe("descendantsOf()", () => {
  it("finds those after a point, and those whose images need one of its, in any order", () => {
    const tree = points("E<D:x", "D<C:x<B", "C<A:x", "B<A:x<A", "A:x");
    expect([...descendantsOf(tree, "B")].sort()).toEqual(["D", "E"]);
    expect([...descendantsOf(tree, "A")].sort()).toEqual(["B", "C", "D", "E"]);
    expect([...descendantsOf(tree, "E")]).toEqual([]);
  });
});

describe("sharedPoints()", () => {
  const shared = (all: readonly PlannedPoint[], ...ids: readonly string[]): readonly string[] =>
    sharedPoints(remove(all, ...ids).merges);

  it("finds what branches would each take, where they part first", () => {
    const branched = points("A:x", "B<A:x<A", "C<B:x<B", "D<B:x<B", "E<D:x<D");
    expect(shared(branched, "A", "B")).toEqual(["B", "A"]);
    expect(shared(branched, "A", "B", "D")).toEqual(["B", "A"]);
    expect(shared(branched, "A")).toEqual([]);
    expect(shared(branched, "A", "B", "C")).toEqual([]);
  });

  it("tells disks apart", () => {
    expect(shared(points("A:x,y", "B<A:x<A,y", "C<A:x,y<A"), "A")).toEqual([]);
    expect(shared(points("A:x,y", "B<A:x<A,y", "C<A:x<A,y<A"), "A")).toEqual(["A"]);
  });
});

/** The points of `points()`, those of `forgotten` as tombstones. */
function stored(all: readonly PlannedPoint[], ...forgotten: readonly string[]): StoredPoint[] {
  return all.map((point) => ({
    ...point,
    tombstone: forgotten.includes(point.id),
    disks: point.disks.map((disk) => ({ ...disk, bytes: 100, garbageBytes: point.id === "C" ? 20 : 10 })),
  }));
}

describe("idleTombstones()", () => {
  const idle = (all: readonly StoredPoint[], ...removed: readonly string[]): string[] => {
    const gone = new Set(removed);
    return [...idleTombstones(all, gone, planRemoval(all, gone).merges)].sort();
  };

  it("finds those whose last child goes, and those that only such a one needed", () => {
    expect(idle(stored(CHAIN, "B", "C"), "D")).toEqual(["B", "C"]);
    expect(idle(stored(CHAIN, "A", "C"), "D")).toEqual(["C"]);
  });

  it("finds none that an image still needs, merged or not", () => {
    expect(idle(stored(CHAIN, "B"), "D")).toEqual([]);
    expect(idle(stored(CHAIN, "B"), "C")).toEqual([]);
    const branched = points("A:x", "B<A:x<A", "C<A:x<A");
    expect(idle(stored(branched, "A"), "B")).toEqual([]);
    expect(idle(stored(branched, "A"), "B", "C")).toEqual(["A"]);
  });

  it("leaves one alone that nobody needed before", () => {
    expect(idle(stored(CHAIN, "D"), "B")).toEqual([]);
  });

  it("finds one whose only child is made full; the tree closes over it", () => {
    const all = stored(CHAIN, "C");
    const merges = planFlatten(all, "D");
    expect([...idleTombstones(all, new Set(), merges)]).toEqual(["C"]);
    const plan = planIdle(all, merges, new Set(["C"]));
    expect(plan).toEqual({ merges, reparented: new Map([["D", "B"]]), removed: ["C"] });
  });
});

describe("planCompaction()", () => {
  it("takes images of which more than the share is garbage, each for itself", () => {
    expect(planCompaction(stored(CHAIN), 0.1)).toEqual([
      { point: "C", disk: "x", token: "x", stack: ["C"], parent: "B" },
    ]);
    expect(planCompaction(stored(CHAIN), 0.2)).toEqual([]);
    expect(planCompaction(stored(CHAIN), 0)).toHaveLength(4);
  });
});
