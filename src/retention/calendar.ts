/** Periods of a calendar, from short to long. */
export const CALENDAR_PERIODS = ["hourly", "daily", "weekly", "monthly", "yearly"] as const;
export type CalendarPeriod = (typeof CALENDAR_PERIODS)[number];

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

/**
 * The period that a moment falls into, as a text that is the same for all moments of that period and no others.
 *
 * Hours are those of the clock on the wall, told apart by its offset from UTC: when summer time ends, the hour that the
 * clock shows twice is two hours. A day that has 23 or 25 of them is one day. Weeks begin on Monday and belong to the year
 * that has their Thursday (ISO 8601).
 *
 * @param timeZone IANA name, such as "Europe/Berlin" or "UTC"
 * @throws {RangeError} for a time zone that is not known
 */
export function periodOf(moment: Date, period: CalendarPeriod, timeZone: string): string {
  const wall = wallClock(moment, timeZone);
  const date = wall.toISOString();
  switch (period) {
    case "hourly": {
      const offset = (wall.getTime() - Math.floor(moment.getTime() / 1000) * 1000) / MINUTE;
      return `${date.slice(0, 13)}${offset < 0 ? "" : "+"}${offset}`;
    }
    case "daily":
      return date.slice(0, 10);
    case "weekly":
      return isoWeek(wall);
    case "monthly":
      return date.slice(0, 7);
    case "yearly":
      return date.slice(0, 4);
  }
}

const formats = new Map<string, Intl.DateTimeFormat>();

/** What the clock on the wall shows, to the second, as if it showed UTC: so that its fields can be asked for. */
function wallClock(moment: Date, timeZone: string): Date {
  let format = formats.get(timeZone);
  if (format === undefined) {
    format = new Intl.DateTimeFormat("en-US", {
      timeZone,
      hourCycle: "h23",
      ...{ year: "numeric", month: "numeric", day: "numeric" },
      ...{ hour: "numeric", minute: "numeric", second: "numeric" },
    });
    formats.set(timeZone, format);
  }
  const fields = new Map(format.formatToParts(moment).map(({ type, value }) => [type, Number(value)]));
  const field = (type: Intl.DateTimeFormatPartTypes): number => fields.get(type) ?? 0;
  return new Date(
    Date.UTC(
      ...([field("year"), field("month") - 1, field("day")] as const),
      ...([field("hour"), field("minute"), field("second")] as const),
    ),
  );
}

function isoWeek(wall: Date): string {
  const dayOfWeek = (wall.getUTCDay() + 6) % 7;
  const thursday = new Date(wall.getTime() + (3 - dayOfWeek) * DAY);
  const year = thursday.getUTCFullYear();
  const week = Math.floor((thursday.getTime() - Date.UTC(year, 0, 1)) / (7 * DAY)) + 1;
  return `${year}-W${String(week).padStart(2, "0")}`;
}
