import type { CliContext, CommonOptions } from "../context.js";

/** Where a report is shown. */
export interface Page {
  /** Columns that fit; Infinity where nothing has to be cut. */
  readonly width: number;
  /** Whether other characters than ASCII can be shown. */
  readonly isUnicode: boolean;
}

/**
 * Lines are cut for a terminal, to its width (or `COLUMNS`, where that is set), and never for a program that reads them; nor
 * with `--verbose`.
 */
export function pageOf({ stdout, environment }: CliContext, { verbose }: CommonOptions): Page {
  const wanted = Number(environment["COLUMNS"]);
  const known = stdout.isTTY ? stdout.columns : Infinity;
  const width = Number.isInteger(wanted) && wanted > 0 ? wanted : known;
  return { width: verbose === true ? Infinity : width, isUnicode: isUnicode(environment) };
}

/** As the C library decides: the first of the three variables that is set. */
function isUnicode(environment: NodeJS.ProcessEnv): boolean {
  const locale = environment["LC_ALL"] || environment["LC_CTYPE"] || environment["LANG"] || "";
  return /utf-?8/i.test(locale);
}
