import { describe, expect, it } from "vitest";
import { planRetention, type RetentionPolicy } from "../../src/retention/index.js";

/** A point at every odd hour of two years, in which summer time begins and ends, and leap days fall. */
const POINTS = Array.from({ length: (2 * 366 * 24) / 2 }, (_, index) => {
  const created = new Date(Date.UTC(2023, 5, 1, 1) + index * 7_200_000).toISOString();
  const id = created.replace(/[-:.]/g, "");
  return { id, created, name: index % 1000 === 7 ? `release-${index}` : null };
});

function kept(policy: RetentionPolicy, timeZone: string): string[] {
  const now = new Date(Date.parse(POINTS.at(-1)!.created) + 60_000);
  return planRetention(POINTS, policy, { now, timeZone })
    .filter(({ reasons }) => reasons.length > 0)
    .map(({ id, reasons }) => `${id.slice(0, 13)} ${reasons.join(", ")}`);
}

describe("planRetention()", () => {
  it.each<[name: string, policy: RetentionPolicy, timeZone: string]>([
    [
      "days, weeks, months and years in Berlin",
      { daily: 7, weekly: 6, monthly: 14, yearly: 3 },
      "Europe/Berlin",
    ],
    ["the same in UTC", { daily: 7, weekly: 6, monthly: 14, yearly: 3 }, "UTC"],
    [
      "hours, names and an age in Adelaide, half an hour off",
      { hourly: 5, within: 36_000_000, names: ["release-*"] },
      "Australia/Adelaide",
    ],
    ["the last ones alone", { last: 3 }, "UTC"],
  ])("keeps what it kept before: %s", async (name, policy, timeZone) => {
    await expect(`${kept(policy, timeZone).join("\n")}\n`).toMatchFileSnapshot(
      `retention/${name.replaceAll(/[^a-z]+/gi, "-").toLowerCase()}.txt`,
    );
  });
});
