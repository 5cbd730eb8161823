import { describe, expect, it } from "vitest";
import { pointTree } from "../../inspect/index.js";
import type { ManifestDamageError, PointManifest } from "../../repository/index.js";
import { pointId, sampleDisk, sampleManifest } from "../../../test/interop/repository-points.js";
import { textWidth } from "./text.js";
import { renderTree } from "./tree.js";

function point(number: number, parent: number | null, changes: Partial<PointManifest> = {}): PointManifest {
  const id = pointId(number);
  const above = parent === null ? null : pointId(parent);
  const incremental = above === null ? {} : { kind: "incremental" as const, reason: null };
  const created = new Date(Date.UTC(2026, 10, 20, 6, number)).toISOString();
  return sampleManifest({
    ...{ id, parent: above, created },
    disks: [sampleDisk(id, { parent: above, ...incremental })],
    ...changes,
  });
}

/** A -> B -> D, B -> E, and another tree; one name is long. */
const POINTS = [
  point(1, null, { name: "a" }),
  point(2, 1, { name: "b", tombstone: true }),
  point(3, 2, { name: "a name that nobody can want to read to its very end, 日本語" }),
  point(4, 2),
  point(5, null, { name: "new" }),
];

describe("renderTree()", () => {
  it("shows branches, the current point, tombstones, and another tree behind a gap", () => {
    const page = { width: Infinity, isUnicode: true };
    const drawn = renderTree(pointTree({ points: POINTS, unreadable: [] }), page, false);
    expect(drawn.split("\n").map((line) => line.replace(/ {2,}.*/, ""))).toEqual([
      "",
      `o ${pointId(1)}`,
      `x ${pointId(2)}`,
      `├─o ${pointId(3)}`,
      `o ${pointId(4)}`,
      "",
      `* ${pointId(5)}`,
      `x ${pointId(2)}: forgotten, kept for others`,
      "",
    ]);
    expect(drawn).toContain("to its very end, 日本語");
  });

  it.each([true, false])(
    "fits 80 columns, cutting names, with characters beyond ASCII or not (%s)",
    (isUnicode) => {
      const deep = Array.from({ length: 12 }, (_, index) => [
        point(10 + index, index === 0 ? null : 9 + index),
        // Each older child becomes a branch of a branch.
        point(60 - index, index === 0 ? null : 9 + index, { name: "n".repeat(250) }),
      ]).flat();
      const lines = pointTree({ points: [...POINTS, ...deep], unreadable: [] });
      expect(Math.max(...lines.map(({ depth }) => depth))).toBeGreaterThan(8);
      const drawn = renderTree(lines, { width: 80, isUnicode }, true).split("\n");
      for (const line of drawn) expect(textWidth(line)).toBeLessThanOrEqual(80);
      expect(drawn.some((line) => line.endsWith(isUnicode ? "…" : "..."))).toBe(true);
      // eslint-disable-next-line no-control-regex -- that is the point
      if (!isUnicode) expect(drawn.filter((line) => /[^\x00-\x7f]/.test(line))).toEqual([]);
      for (const { id } of lines) expect(drawn.some((line) => line.includes(id))).toBe(true);
    },
  );

  it("says the zone once where it is the same for all, else behind each time", () => {
    const page = { width: 80, isUnicode: true };
    const render = (points: readonly PointManifest[]): string =>
      renderTree(pointTree({ points, unreadable: [] }), page, false);
    const [one] = POINTS as [PointManifest];
    const summer = point(6, 1, { created: "2026-07-20T06:00:00.000Z" });
    const zone = process.env["TZ"];
    process.env["TZ"] = "Europe/Berlin";
    try {
      expect(render([one])).toMatch(/CREATED \(\+0100\).*\n.*2026-11-20 07:01 /);
      expect(render([one, summer])).toMatch(
        /CREATED {2,}.*\n.*2026-11-20 07:01 \+0100.*\n.*2026-07-20 08:00 \+0200/,
      );
    } finally {
      if (zone === undefined) delete process.env["TZ"];
      else process.env["TZ"] = zone;
    }
  });
});

describe("renderTree(), where something is damaged", () => {
  it("marks every point that cannot be restored, and says once why", () => {
    const points = [point(1, null), point(3, 2), point(4, 3), point(6, 5)];
    const unreadable = [{ id: pointId(2), error: new Error("damaged") as unknown as ManifestDamageError }];
    const drawn = renderTree(pointTree({ points, unreadable }), { width: 80, isUnicode: true }, false);
    expect(drawn.split("\n").map((line) => line.replace(/ {2,}.*/, ""))).toEqual([
      "",
      `o ${pointId(1)}`,
      "",
      `! ${pointId(2)}`,
      `! ${pointId(3)}`,
      `! ${pointId(4)}`,
      "",
      `! ${pointId(5)}`,
      `! ${pointId(6)}`,
      `! ${pointId(2)}: its manifest cannot be read; 2 points need it`,
      `! ${pointId(5)}: it is not there; 1 point needs it`,
      "",
    ]);
    expect(drawn).toMatch(new RegExp(`! ${pointId(2)} +unreadable\n! ${pointId(3)} .* incr `));
  });
});
