import { describe, expect, it } from "vitest";
import type { ManifestDamageError, PointManifest } from "../repository/index.js";
import { pointId, sampleDisk, sampleManifest } from "../../test/interop/repository-points.js";
import { pointTree } from "./points.js";

/** A point, and the parent of itself and its only disk. */
function point(number: number, parent: number | null, changes: Partial<PointManifest> = {}): PointManifest {
  const id = pointId(number);
  const above = parent === null ? null : pointId(parent);
  const disk = sampleDisk(id, {
    parent: above,
    ...(above === null ? {} : { kind: "incremental", reason: null }),
  });
  return sampleManifest({ id, parent: above, disks: [disk], ...changes });
}

function draw(points: readonly PointManifest[], unreadable: readonly number[] = []): string[] {
  const error = new Error("damaged") as unknown as ManifestDamageError;
  const lines = pointTree({
    points,
    unreadable: unreadable.map((number) => ({ id: pointId(number), error })),
  });
  return lines.map(({ id, state, current, depth, link, lacks }) => {
    const number = Number(id.slice(-6));
    const words = [
      ...(current ? ["current"] : []),
      ...(state === "standing" ? [] : [state]),
      ...(link === "trunk" ? [] : [link]),
      ...lacks.map((lack) => `lacks ${Number(lack.slice(-6))}`),
    ];
    return `${" ".repeat(depth)}${number}${words.map((word) => ` ${word}`).join("")}`;
  });
}

describe("pointTree()", () => {
  it("draws a chain as a line, the newest being current", () => {
    expect(draw([point(1, null), point(2, 1), point(3, 2)])).toEqual(["1 root", "2", "3 current"]);
  });

  it("reads a branch to its end before the line goes on, also one of a branch", () => {
    // A(1) -> B(2) -> D(3) -> F(5), B -> E(6); D -> G(4)
    const points = [point(1, null), point(2, 1), point(3, 2), point(4, 3), point(5, 3), point(6, 2)];
    expect(draw(points)).toEqual(["1 root", "2", " 3 branch", "  4 branch", " 5", "6 current"]);
  });

  it("calls the newest current, whatever its branch, but no tombstone", () => {
    const points = [point(1, null), point(2, 1), point(3, 1), point(4, 2, { tombstone: true })];
    expect(draw(points)).toEqual(["1 root", " 2 branch", " 4 forgotten", "3 current"]);
  });

  it("shows a point that cannot be read, and all that it costs, where its children need it", () => {
    expect(draw([point(1, null), point(3, 2), point(4, 3)], [2])).toEqual([
      "1 root",
      "2 unreadable root lacks 2",
      "3 lacks 2",
      "4 current lacks 2",
    ]);
  });

  it("shows a point that is missing, but only where an image needs it", () => {
    const whole = point(5, null, { parent: pointId(4) });
    expect(draw([point(1, null), point(3, 2), whole])).toEqual([
      "1 root",
      "2 missing root lacks 2",
      "3 lacks 2",
      "5 current root",
    ]);
  });

  it("follows each disk alone: a full one among incremental ones does not cover for them", () => {
    const [a, b] = ["0000000a", "0000000b"];
    const disk = (number: number, token: string, parent: number | null): PointManifest["disks"][number] => ({
      ...(point(number, parent).disks[0] as PointManifest["disks"][number]),
      ...{ token, name: token, image: `${token}.qcow2`, bitmap: null },
    });
    const points = [
      point(2, 1, { disks: [disk(2, a, null), disk(2, b, 1)] }),
      point(3, 2, { disks: [disk(3, a, 2)] }),
      point(4, 2, { disks: [disk(4, a, 2), disk(4, b, 2)] }),
      // Of a disk that its parent does not hold.
      point(5, 3, { disks: [disk(5, b, 3)] }),
    ];
    expect(draw(points, [1])).toEqual([
      "1 unreadable root lacks 1",
      "2 lacks 1",
      " 3 branch",
      " 5 current lacks 3",
      "4 lacks 1",
    ]);
  });

  it("takes a chain of thousands of points, in no time", () => {
    const points = Array.from({ length: 5000 }, (_, index) => point(index + 1, index === 0 ? null : index));
    const started = performance.now();
    expect(pointTree({ points, unreadable: [] })).toHaveLength(5000);
    expect(performance.now() - started).toBeLessThan(1000);
  });
});
