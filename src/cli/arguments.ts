import { InvalidArgumentError } from "commander";
import { parseSize } from "../bytes/index.js";
import type { Extent } from "../extent/index.js";

/** Parsers of option values: what they throw becomes "wrong usage", naming the option. */

export function sizeArgument(text: string): number {
  const bytes = parseSize(text);
  if (bytes === undefined)
    throw new InvalidArgumentError("A size is written 64MiB, 2GiB, or as plain bytes.");
  return bytes;
}

export function rateArgument(text: string): number {
  const bytes = parseSize(text.replace(/\/s$/, ""));
  if (bytes === undefined || bytes === 0) throw new InvalidArgumentError("A rate is written 100MiB/s.");
  return bytes;
}

export function integerArgument(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (/^\d+$/.test(text) && value >= least && value <= most) return value;
    throw new InvalidArgumentError(`A whole number from ${least} to ${most} is needed.`);
  };
}

const MILLISECONDS: Readonly<Record<string, number>> = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** `90s`, `15m`, `6h`, `7d`: milliseconds. */
export function durationArgument(text: string): number {
  const [, amount, unit = ""] = /^(\d+)([smhd])$/.exec(text) ?? [];
  const duration = Number(amount) * (MILLISECONDS[unit] ?? Number.NaN);
  if (Number.isSafeInteger(duration)) return duration;
  throw new InvalidArgumentError("A duration is written 90s, 15m, 6h or 7d.");
}

/** A text that may be given several times. */
export function repeatedArgument(text: string, previous: readonly string[] = []): string[] {
  return [...previous, text];
}

/** `OFFSET:LENGTH`, both sizes. */
export function rangeArgument(text: string): Extent {
  const [offset, length, more] = text.split(":").map(parseSize);
  if (offset !== undefined && length !== undefined && more === undefined && text.split(":").length === 2) {
    return { offset, length };
  }
  throw new InvalidArgumentError("A range is written OFFSET:LENGTH, for example 1MiB:64KiB.");
}

/** An ISO 8601 time; without an offset it is local time. */
export function timeArgument(text: string): Date {
  const time = new Date(text);
  const isIso = /^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?$/.test(text);
  if (!isIso || Number.isNaN(time.getTime())) {
    throw new InvalidArgumentError("A time is written 2026-11-20T06:50:09Z.");
  }
  return time;
}

/** `--disk DEVICE[=NAME]`, repeatable. */
export function diskArgument(
  text: string,
  previous: readonly { device: string; name?: string }[] = [],
): { device: string; name?: string }[] {
  const [, device, name] = /^([^=]+)(?:=(.+))?$/.exec(text) ?? [];
  if (device === undefined) throw new InvalidArgumentError("A disk is written DEVICE or DEVICE=NAME.");
  return [...previous, name === undefined ? { device } : { device, name }];
}

/** `--image [NAME=]FILE`, repeatable. What stands before the first "=" is a name only if it could be one. */
export function imageArgument(
  text: string,
  previous: readonly { file: string; name?: string }[] = [],
): { file: string; name?: string }[] {
  const [, name, file] = /^([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)$/.exec(text) ?? [];
  const image = name === undefined || file === undefined ? { file: text } : { file, name };
  return [...previous, image];
}
