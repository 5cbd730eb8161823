import { describe, expect, it } from "vitest";
import { isEmptyPolicy, matchesPattern, periodOf, planRetention, type RetentionPolicy } from "./index.js";

const BERLIN = "Europe/Berlin";
const at = (text: string): Date => new Date(text);

describe("periodOf()", () => {
  it.each([
    ["daily", "2026-11-20T22:59:59Z", "UTC", "2026-11-20"],
    ["daily", "2026-11-20T23:00:00Z", BERLIN, "2026-11-21"],
    ["monthly", "2026-10-31T23:30:00Z", BERLIN, "2026-11"],
    ["yearly", "2026-12-31T23:30:00Z", BERLIN, "2027"],
    ["yearly", "2026-12-31T23:30:00Z", "UTC", "2026"],
    ["weekly", "2026-11-22T12:00:00Z", "UTC", "2026-W47"],
    ["weekly", "2026-11-23T12:00:00Z", "UTC", "2026-W48"],
    ["weekly", "2027-01-01T12:00:00Z", "UTC", "2026-W53"],
    ["weekly", "2027-01-04T12:00:00Z", "UTC", "2027-W01"],
    ["weekly", "2024-12-30T12:00:00Z", "UTC", "2025-W01"],
    ["weekly", "2022-01-02T12:00:00Z", "UTC", "2021-W52"],
    ["daily", "2026-11-20T00:00:00Z", "UTC", "2026-11-20"],
  ] as const)("%s of %s in %s is %s", (period, moment, zone, expected) => {
    expect(periodOf(at(moment), period, zone)).toBe(expected);
  });

  it("tells the hour that the clock shows twice when summer time ends as two", () => {
    const summer = periodOf(at("2026-10-25T00:30:00Z"), "hourly", BERLIN);
    const winter = periodOf(at("2026-10-25T01:30:00Z"), "hourly", BERLIN);
    expect([summer, winter]).toEqual(["2026-10-25T02+120", "2026-10-25T02+60"]);
    expect(periodOf(at("2026-10-25T01:59:59.999Z"), "hourly", BERLIN)).toBe(winter);
  });

  it("has 25 hours in the day on which summer time ends, 23 where it begins", () => {
    const hoursOf = (day: string): number => {
      const hours = new Set<string>();
      for (
        let time = Date.parse(`${day}T00:00:00Z`) - 86_400_000;
        time < Date.parse(`${day}T00:00:00Z`) + 172_800_000;
        time += 900_000
      ) {
        if (periodOf(new Date(time), "daily", BERLIN) === day)
          hours.add(periodOf(new Date(time), "hourly", BERLIN));
      }
      return hours.size;
    };
    expect([hoursOf("2026-10-25"), hoursOf("2026-03-29"), hoursOf("2026-11-20")]).toEqual([25, 23, 24]);
  });

  it("knows offsets of half an hour, and of less than none", () => {
    expect(periodOf(at("2026-11-20T18:31:00Z"), "daily", "Asia/Kolkata")).toBe("2026-11-21");
    expect(periodOf(at("2026-11-20T04:59:00Z"), "hourly", "America/New_York")).toBe("2026-11-19T23-300");
  });

  it("throws for a time zone that is not known", () => {
    expect(() => periodOf(at("2026-11-20T00:00:00Z"), "daily", "Mars/Olympus")).toThrow(RangeError);
  });
});

describe("matchesPattern()", () => {
  it.each([
    ["before-upgrade", "before-*", true],
    ["before-upgrade", "*-upgrade", true],
    ["before-upgrade", "b*e*e", true],
    ["before-upgrade", "before", false],
    ["a.b", "a?b", true],
    ["ab", "a?b", false],
    ["", "*", true],
    ["", "?", false],
    ["Weekly", "weekly", false],
    ["a(b)[c]", "a(b)[c]", true],
    ["größe", "gr??e", true],
  ])("%j against %j: %s", (name, pattern, expected) => {
    expect(matchesPattern(name, pattern)).toBe(expected);
  });

  it("needs no exponential time", () => {
    expect(matchesPattern("a".repeat(5000), `${"a*".repeat(500)}b`)).toBe(false);
  });
});

/** One point an hour, newest last. */
function hourly(
  count: number,
  until: string,
  names: Readonly<Record<number, string>> = {},
): {
  id: string;
  created: string;
  name: string | null;
}[] {
  return Array.from({ length: count }, (_, index) => {
    const created = new Date(Date.parse(until) - (count - 1 - index) * 3_600_000).toISOString();
    return { id: created.replace(/[-:.]/g, ""), created, name: names[index] ?? null };
  });
}

const plan = (
  points: ReturnType<typeof hourly>,
  policy: RetentionPolicy,
  now = "2026-11-20T12:00:00Z",
  timeZone = "UTC",
): Record<string, readonly string[]> =>
  Object.fromEntries(
    planRetention(points, policy, { now: at(now), timeZone })
      .filter(({ reasons }) => reasons.length > 0)
      .map(({ id, reasons }) => [id.slice(0, 11), reasons]),
  );

describe("planRetention()", () => {
  const points = hourly(60, "2026-11-20T11:30:00Z", { 3: "before-upgrade" });

  it("keeps the newest point of each of the newest periods that have one", () => {
    expect(plan(points, { daily: 2 })).toEqual({
      "20261119T23": ["daily 2026-11-19"],
      "20261120T11": ["current", "daily 2026-11-20"],
    });
  });

  it("counts periods that have points, not those that passed", () => {
    const sparse = [
      ...hourly(1, "2026-01-05T00:00:00Z"),
      ...hourly(1, "2026-06-05T00:00:00Z"),
      ...hourly(1, "2026-11-05T00:00:00Z"),
    ];
    expect(Object.keys(plan(sparse, { monthly: 2 }))).toEqual(["20260605T00", "20261105T00"]);
  });

  it("gives every rule that keeps a point", () => {
    expect(plan(points, { last: 2, daily: 1, within: 3_600_000, names: ["before-*"] })).toEqual({
      "20261118T03": ['name matches "before-*"'],
      "20261120T10": ["last 2"],
      "20261120T11": ["current", "last 1", "daily 2026-11-20", "within the time to keep"],
    });
  });

  it("returns a verdict for every point, oldest first, whatever their order", () => {
    const verdicts = planRetention([...points].reverse(), { last: 1 }, { now: new Date(), timeZone: "UTC" });
    expect(verdicts.map(({ id }) => id)).toEqual(points.map(({ id }) => id));
    expect(verdicts.filter(({ reasons }) => reasons.length === 0)).toHaveLength(59);
  });

  it("keeps the newest point whatever the rules say", () => {
    expect(plan(points, { names: ["nothing"] })).toEqual({ "20261120T11": ["current"] });
  });

  it("orders by id, not by time: a clock that was set back reorders nothing", () => {
    const back = [
      { id: "20261120T100000000Z-000001", created: "2026-11-20T10:00:00Z", name: null },
      { id: "20261120T100000001Z-000002", created: "2026-11-20T08:00:00Z", name: null },
    ];
    expect(plan(back, { last: 1 })).toEqual({ "20261120T10": ["current", "last 1"] });
    expect(planRetention(back, { last: 1 }, { now: new Date(), timeZone: "UTC" })[0]?.reasons).toEqual([]);
  });

  it("keeps both of the hours that the clock shows twice", () => {
    const night = hourly(3, "2026-10-25T02:10:00Z");
    expect(Object.values(plan(night, { hourly: 3 }, "2026-10-25T03:00:00Z", BERLIN))).toEqual([
      ["hourly 2026-10-25T02+120"],
      ["hourly 2026-10-25T02+60"],
      ["current", "hourly 2026-10-25T03+60"],
    ]);
  });

  it.each([{}, { last: 0 }, { names: [] }, { daily: 0, within: 0 }])(
    "refuses policy %j: it would remove everything",
    (policy) => {
      expect(isEmptyPolicy(policy)).toBe(true);
      expect(() => planRetention(points, policy, { now: new Date(), timeZone: "UTC" })).toThrow(
        "nothing says which are to be kept",
      );
    },
  );

  it.each([{ last: -1 }, { daily: 1.5 }, { within: Number.NaN }])(
    "refuses policy %j: that is no count",
    (policy) => {
      expect(() => planRetention(points, policy, { now: new Date(), timeZone: "UTC" })).toThrow(
        "that is no count",
      );
    },
  );

  it("refuses an empty pattern: a script's variable that was not set would cost all points", () => {
    const policy = { names: ["release-*", ""] };
    expect(() => planRetention(points, policy, { now: new Date(), timeZone: "UTC" })).toThrow(
      "an empty pattern",
    );
  });

  it("has nothing to say of no points", () => {
    expect(planRetention([], { last: 1 }, { now: new Date(), timeZone: "UTC" })).toEqual([]);
  });
});
