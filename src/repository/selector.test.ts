import { describe, expect, it } from "vitest";
import { NotFoundError, UsageError } from "../errors/index.js";
import { parsePointReference, selectPoint, type SelectablePoint } from "./selector.js";

function point(minute: number, parent: number | null, name: string | null = null): SelectablePoint {
  const id = (value: number): string =>
    `20261120T06${String(value).padStart(2, "0")}00000Z-00aa0${value % 10}`;
  const created = `2026-11-20T06:${String(minute).padStart(2, "0")}:00.000Z`;
  return { id: id(minute), parent: parent === null ? null : id(parent), name, created, disks: [] };
}

/** 10 <- 20 <- 30, and 40, made after a restore of 20. */
const POINTS = [point(10, null), point(20, 10, "before upgrade"), point(30, 20), point(40, 20, "branch")];
const [P10, P20, P30, P40] = POINTS as [SelectablePoint, SelectablePoint, SelectablePoint, SelectablePoint];

describe("parsePointReference()", () => {
  it("splits at the first @", () => {
    expect(parsePointReference("web@latest~2")).toEqual({ machine: "web", selector: "latest~2" });
    expect(parsePointReference("web@mail@night")).toEqual({ machine: "web", selector: "mail@night" });
    expect(parsePointReference("web")).toEqual({ machine: "web", selector: undefined });
  });

  it.each(["", "@x", "../web@x", "web@", "-web", "a/b@latest", "tidemark.json"])("refuses %j", (text) => {
    expect(() => parsePointReference(text)).toThrow(UsageError);
  });
});

describe("selectPoint()", () => {
  it("takes the newest id for latest, whatever its branch", () => {
    expect(selectPoint(POINTS)).toBe(P40);
    expect(selectPoint([...POINTS].reverse(), "latest")).toBe(P40);
  });

  it("climbs parents for latest~N", () => {
    expect(selectPoint(POINTS, "latest~0")).toBe(P40);
    expect(selectPoint(POINTS, "latest~1")).toBe(P20);
    expect(selectPoint(POINTS, "latest~2")).toBe(P10);
    expect(() => selectPoint(POINTS, "latest~3")).toThrow(/latest~3.*has 2 before it/);
  });

  it("passes over points that were forgotten, also on the way to others", () => {
    const forgotten = POINTS.map((item) => (item === P20 ? { ...item, tombstone: true } : item));
    expect(selectPoint(forgotten, "latest~1")).toBe(P10);
    expect(() => selectPoint(forgotten, "latest~2")).toThrow(/latest~2.*has 1 before it/);
    expect(() => selectPoint(forgotten, "before upgrade")).toThrow(NotFoundError);
    expect(selectPoint(forgotten.map((item) => (item === P40 ? { ...item, tombstone: true } : item)))).toBe(
      P30,
    );
  });

  it("finds an id, the unique beginning of one, or a name", () => {
    expect(selectPoint(POINTS, P30.id)).toBe(P30);
    expect(selectPoint(POINTS, "20261120T063")).toBe(P30);
    expect(selectPoint(POINTS, "before upgrade")).toBe(P20);
  });

  it("lists the candidates of a beginning that several ids have", () => {
    expect(() => selectPoint(POINTS, "20261120T06")).toThrow(UsageError);
    for (const { id } of POINTS) expect(() => selectPoint(POINTS, "2026")).toThrow(id);
  });

  it("lists the candidates of a name that two points have", () => {
    const twice = [...POINTS, point(50, 40, "branch")];
    expect(() => selectPoint(twice, "branch")).toThrow(/063?4000000Z-00aa00 \(branch\)|06400000/);
    expect(() => selectPoint(twice, "branch")).toThrow(UsageError);
  });

  it("prefers the id itself to a name that looks like it", () => {
    expect(selectPoint([P10, { ...P20, name: P10.id }], P10.id)).toBe(P10);
  });

  it("takes the newest point at or before a time", () => {
    expect(selectPoint(POINTS, undefined, { at: new Date("2026-11-20T06:30:00.000Z") })).toBe(P30);
    expect(selectPoint(POINTS, undefined, { at: new Date("2026-11-20T06:29:59.999Z") })).toBe(P20);
    const before = new Date("2026-11-20T06:09:59Z");
    expect(() => selectPoint(POINTS, undefined, { at: before })).toThrow(NotFoundError);
    expect(() => selectPoint(POINTS, "latest", { at: before })).toThrow(UsageError);
  });

  it("says which machine has no such point, or none at all", () => {
    expect(() => selectPoint(POINTS, "nightly", { machine: "web" })).toThrow(/"nightly" of machine "web"/);
    expect(() => selectPoint(POINTS, "nightly")).toThrow(NotFoundError);
    expect(() => selectPoint([], "latest", { machine: "web" })).toThrow(NotFoundError);
  });
});
