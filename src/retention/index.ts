/**
 * Retention: which points of a machine are kept, by rules about their age and names. Pure planning; who applies a
 * plan stands higher up.
 *
 * - policy: how many points are kept, of which calendar periods, of which age, of which names.
 * - period: an hour, a day, a week, a month or a year of a calendar; of the points of one period the newest is kept.
 * - verdict: whether a point is kept, and every reason why.
 */
export { CALENDAR_PERIODS, periodOf, type CalendarPeriod } from "./calendar.js";
export { matchesPattern } from "./pattern.js";
export {
  isEmptyPolicy,
  planRetention,
  type RetainablePoint,
  type RetentionPolicy,
  type RetentionVerdict,
} from "./plan.js";
