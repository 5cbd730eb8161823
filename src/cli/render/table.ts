import { cutText, padText, textWidth } from "./text.js";

/** A column: its heading, and which side its cells stand on. */
export interface Column {
  readonly title: string;
  readonly align?: "left" | "right";
}

/** Its cells, or a whole line. */
export type Row = readonly string[] | string;

/** How wide a table may be. */
export interface TableOptions {
  /** Columns of the terminal; default: as many as it takes. */
  readonly width?: number | undefined;
  /** What stands at the end of a line that was cut. */
  readonly mark?: string | undefined;
}

/**
 * Aligned plain-text table, two spaces between columns, no trailing blanks. What does not fit is cut at the end of the line: the
 * last column is the one that can be done without. A row that is no list of cells is a line of its own, below the one before.
 */
export function renderTable(
  columns: readonly Column[],
  rows: readonly Row[],
  { width = Infinity, mark }: TableOptions = {},
): string {
  const widths = columns.map(({ title }, index) =>
    rows.reduce(
      (most, row) => (typeof row === "string" ? most : Math.max(most, textWidth(row[index] ?? ""))),
      title.length,
    ),
  );
  const align = (cells: readonly string[]): string =>
    columns
      .map((column, index) => padText(cells[index] ?? "", widths[index] ?? 0, column.align))
      .join("  ")
      .trimEnd();
  const line = (row: Row): string => cutText(typeof row === "string" ? row : align(row), width, mark);
  return [line(columns.map(({ title }) => title)), ...rows.map(line)].map((text) => `${text}\n`).join("");
}
