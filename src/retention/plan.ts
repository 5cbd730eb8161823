import { UsageError } from "../errors/index.js";
import { CALENDAR_PERIODS, periodOf, type CalendarPeriod } from "./calendar.js";
import { matchesPattern } from "./pattern.js";

/** What retention needs to know of a point. */
export interface RetainablePoint {
  /** Sortable as text: oldest first. */
  readonly id: string;
  /** Time of its freeze, ISO 8601. */
  readonly created: string;
  readonly name: string | null;
}

/** What is kept. Whatever any rule keeps is kept; 0 is as good as leaving a rule out. */
export type RetentionPolicy = Readonly<Partial<Record<CalendarPeriod, number>>> & {
  /** The newest points. */
  readonly last?: number | undefined;
  /** Milliseconds: points that are not older. */
  readonly within?: number | undefined;
  /** Points whose name matches any of these patterns. */
  readonly names?: readonly string[] | undefined;
};

/** What becomes of a point. */
export interface RetentionVerdict {
  readonly id: string;
  /** Every rule that keeps it, for people: "daily 2026-11-20". None: it is removed. */
  readonly reasons: readonly string[];
}

/** Whether a policy has no rule at all. */
export function isEmptyPolicy(policy: RetentionPolicy): boolean {
  const counts = [policy.last, policy.within, ...CALENDAR_PERIODS.map((period) => policy[period])];
  return counts.every((count) => count === undefined || count === 0) && (policy.names ?? []).length === 0;
}

/**
 * Decides which points of a machine are kept.
 *
 * A calendar rule of N keeps the newest point of each of the N newest periods that have any: a machine that was off
 * for a month loses nothing by it. The newest point is always kept: the next backup continues it.
 *
 * @param points of one machine, in any order
 * @param now what ages are counted from
 * @param timeZone IANA name of the calendar's time zone
 * @returns a verdict for each point, oldest first
 * @throws {UsageError} for a policy without any rule, which would remove everything, and for counts and patterns that are none
 */
export function planRetention(
  points: readonly RetainablePoint[],
  policy: RetentionPolicy,
  { now, timeZone }: { readonly now: Date; readonly timeZone: string },
): RetentionVerdict[] {
  requirePolicy(policy);
  const newestFirst = [...points].sort((a, b) => (a.id < b.id ? 1 : -1));
  const reasons = new Map<string, string[]>(newestFirst.map(({ id }) => [id, []]));
  const keep = ({ id }: RetainablePoint, reason: string): void => void reasons.get(id)?.push(reason);

  for (const point of newestFirst.slice(0, 1)) keep(point, "current");
  for (const [index, point] of newestFirst.slice(0, policy.last ?? 0).entries()) {
    keep(point, `last ${index + 1}`);
  }
  for (const period of CALENDAR_PERIODS) {
    const seen = new Set<string>();
    for (const point of newestFirst) {
      const name = periodOf(new Date(point.created), period, timeZone);
      if (seen.has(name)) continue;
      if (seen.size === (policy[period] ?? 0)) break;
      seen.add(name);
      keep(point, `${period} ${name}`);
    }
  }
  const { within = 0, names = [] } = policy;
  for (const point of newestFirst) {
    const age = now.getTime() - Date.parse(point.created);
    if (within > 0 && age <= within) keep(point, "within the time to keep");
    const pattern = names.find((candidate) => point.name !== null && matchesPattern(point.name, candidate));
    if (pattern !== undefined) keep(point, `name matches "${pattern}"`);
  }
  return newestFirst.map(({ id }) => ({ id, reasons: reasons.get(id) ?? [] })).reverse();
}

function requirePolicy(policy: RetentionPolicy): void {
  const counts = [policy.last, policy.within, ...CALENDAR_PERIODS.map((period) => policy[period])];
  const wrong = counts.find((count) => count !== undefined && !(Number.isSafeInteger(count) && count >= 0));
  if (wrong !== undefined) throw new UsageError(`Cannot keep ${wrong} points: that is no count`);
  // Most likely a variable of a script that was not set: no point has such a name, and all would go.
  if (policy.names?.includes("") === true) {
    throw new UsageError("Cannot keep points by an empty pattern: it matches no name");
  }
  if (!isEmptyPolicy(policy)) return;
  throw new UsageError("Cannot thin out the points: nothing says which are to be kept", {
    hint: "Name at least one rule, such as --keep-last 10 or --keep-daily 7",
  });
}
