import { randomBytes } from "node:crypto";

const POINT_ID = /^(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d{2})(\d{3})Z-[0-9a-f]{6}$/;

/** Whether `text` has the form of a point id: `20261120T065009123Z-4f2a91`. */
export function isPointId(text: string): boolean {
  return POINT_ID.test(text);
}

/** The UTC time that a point id carries. @throws {RangeError} when `id` is none */
export function pointTime(id: string): Date {
  const fields = POINT_ID.exec(id);
  if (fields === null) throw new RangeError(`"${id}" is not a point id`);
  const [, year, month, day, hour, minute, second, millisecond] = fields;
  return new Date(
    `${year ?? ""}-${month ?? ""}-${day ?? ""}T${hour ?? ""}:${minute ?? ""}:${second ?? ""}.${millisecond ?? ""}Z`,
  );
}

/**
 * A new id, sortable as text: its time is max(`now`, time of `newest` + 1 ms), so a clock
 * that was set back never reorders a chain.
 *
 * @param newest the newest id of the same machine, if there is one
 */
export function newPointId(now: Date, newest?: string): string {
  const floor = newest === undefined ? 0 : pointTime(newest).getTime() + 1;
  const time = new Date(Math.max(now.getTime(), floor)).toISOString();
  return `${time.replace(/[-:.]/g, "")}-${randomBytes(3).toString("hex")}`;
}
