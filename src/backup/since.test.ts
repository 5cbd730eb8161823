import { describe, expect, it } from "vitest";
import { NotFoundError, UsageError } from "../errors/index.js";
import { ManifestDamageError, type PointManifest, type Survey } from "../repository/index.js";
import { requireSense, sincePoint } from "./since.js";

const point = (id: string, name: string | null, tombstone = false): PointManifest =>
  ({
    id,
    name,
    tombstone,
    parent: null,
    disks: [],
    created: "2026-11-20T00:00:00Z",
  }) as unknown as PointManifest;
const survey = (...points: PointManifest[]): Survey => ({ points, unreadable: [], uncommitted: [] });

describe("sincePoint()", () => {
  const machine = "vm";

  it("finds a point by id, prefix, name or latest, never one that was forgotten", () => {
    const all = survey(point("aa1", "monday"), point("ab2", null), point("b3", "gone", true));
    const find = (since?: string) => sincePoint(all, { machine, since })?.id;
    expect(find()).toBeUndefined();
    expect(find("aa1")).toBe("aa1");
    expect(find("ab")).toBe("ab2");
    expect(find("monday")).toBe("aa1");
    expect(find("latest")).toBe("ab2");
    expect(() => find("b3")).toThrow(NotFoundError);
    expect(() => find("a")).toThrow(UsageError);
  });

  it("names the damage where the point may be the one that cannot be read", () => {
    const error = new ManifestDamageError("vm/c4/point.json", ["c4"], "it is not JSON text");
    const damaged = { ...survey(point("aa1", null)), unreadable: [{ id: "c4", error }] };
    expect(() => sincePoint(damaged, { machine, since: "c4" })).toThrow(error);
    expect(() => sincePoint(damaged, { machine, since: "latest" })).toThrow(error);
    expect(sincePoint(damaged, { machine, since: "aa" })?.id).toBe("aa1");
  });
});

describe("requireSense()", () => {
  it.each([
    [{ full: true, since: "x" }, "--full or --since"],
    [{ keepCheckpoints: 0 }, "Cannot keep 0"],
    [{ keepCheckpoints: 17 }, "Cannot keep 17"],
    [{ keepCheckpoints: 1.5 }, "Cannot keep 1.5"],
  ])("refuses %o", (options, says) => {
    expect(() => requireSense({ machine: "vm", ...options })).toThrow(says);
  });

  it("takes 1 to 16 checkpoints", () => {
    for (const keepCheckpoints of [undefined, 1, 16]) requireSense({ machine: "vm", keepCheckpoints });
  });
});
