import { describe, expect, it } from "vitest";
import type { SourceDisk } from "../source.js";
import type { CataloguePoint } from "./catalogue.js";
import type { BaseChoice } from "./choose.js";
import { chooseComparisons } from "./compare.js";

const UUID = "11111111-2222-4333-8444-555555555555";
const CLUSTER = 65_536;

function point(
  id: string,
  disks: Record<string, string>,
  more: { uuid?: string; clusterSize?: number } = {},
): CataloguePoint {
  const { uuid = UUID, clusterSize = CLUSTER } = more;
  return {
    id,
    machine: { uuid },
    disks: Object.entries(disks).map(([name, token]) => ({ name, token, clusterSize, virtualSize: 1024 })),
  };
}

const disk = (name: string): SourceDisk => ({ name }) as SourceDisk;
const full = (token?: string): BaseChoice => ({ kind: "full", reason: "bitmap lost", token });
const incremental = (token: string, checkpoint: string): BaseChoice =>
  ({ kind: "incremental", token, checkpoint, parentDiskName: "x", parentVirtualSize: 1 }) as BaseChoice;

function decide(
  choices: readonly (readonly [string, BaseChoice])[],
  points: readonly CataloguePoint[],
  always = false,
): unknown[] {
  const disks = choices.map(([name]) => disk(name));
  const map = new Map(disks.map((one, index) => [one, choices[index]![1]]));
  const names = new Map(disks.map((one) => [one, one.name]));
  const context = { points, machineUuid: UUID, clusterSize: CLUSTER, names, always };
  const decisions = chooseComparisons(disks, map, context);
  return disks.map((one) => {
    const decision = decisions.get(one);
    return decision?.kind === "compare"
      ? `${decision.checkpoint}/${decision.parentDiskName}=${decision.token}: ${decision.reason}`
      : decision?.kind;
  });
}

describe("chooseComparisons()", () => {
  it("takes the newest point that holds the disk, by its token before its name", () => {
    const points = [
      point("1", { a: "tok-a", b: "tok-b" }),
      point("2", { b: "tok-a" }),
      point("3", { c: "tok-c" }),
    ];
    expect(decide([["a", full("tok-a")]], points)).toEqual(["2/b=tok-a: bitmap lost"]);
    expect(decide([["a", full()]], points)).toEqual(["1/a=tok-a: bitmap lost"]);
    expect(decide([["b", full()]], points)).toEqual(["2/b=tok-a: bitmap lost"]);
    expect(decide([["d", full()]], points)).toEqual(["full"]);
    expect(decide([["a", full("tok-gone")]], points)).toEqual(["full"]);
  });

  it("leaves out points of other machines, and of other clusters", () => {
    const points = [
      point("1", { a: "tok-a" }),
      point("2", { a: "tok-a" }, { uuid: "99999999-2222-4333-8444-555555555555" }),
      point("3", { a: "tok-a" }, { clusterSize: 4096 }),
    ];
    expect(decide([["a", full()]], points)).toEqual(["1/a=tok-a: bitmap lost"]);
    expect(decide([["a", full()]], points.slice(1))).toEqual(["full"]);
  });

  it("gives a chain to one disk only", () => {
    const points = [point("1", { a: "tok-a", b: "tok-b" })];
    // The disk that was called a is here under another name, with its bitmap.
    expect(
      decide(
        [
          ["a", full()],
          ["z", incremental("tok-a", "1")],
        ],
        points,
      ),
    ).toEqual(["full", "incremental"]);
    expect(
      decide(
        [
          ["a", full()],
          ["z", full("tok-a")],
        ],
        points,
      ),
    ).toEqual(["full", "1/a=tok-a: bitmap lost"]);
    expect(
      decide(
        [
          ["a", full()],
          ["a", full()],
        ],
        points,
      ),
    ).toEqual(["1/a=tok-a: bitmap lost", "full"]);
  });

  it("leaves disks that have a bitmap to it, unless all are to be compared", () => {
    const points = [point("1", { a: "tok-a" }), point("2", { a: "tok-a" })];
    expect(decide([["a", incremental("tok-a", "1")]], points)).toEqual(["incremental"]);
    expect(decide([["a", incremental("tok-a", "1")]], points, true)).toEqual([
      "2/a=tok-a: --compare was given",
    ]);
  });
});
