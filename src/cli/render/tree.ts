import { formatSize } from "../../bytes/index.js";
import type { PointLine } from "../../inspect/index.js";
import type { DiskManifest, PointManifest } from "../../repository/index.js";
import { kindOf, storedBytes } from "./point.js";
import { renderTable, type Row } from "./table.js";
import type { Page } from "./terminal.js";
import { formatMinute, formatZone } from "./time.js";

/** Branches that are told apart where lines have to fit; deeper ones stand in the last column. */
const MOST_BRANCHES = 5;

const UNICODE = { through: "│ ", branch: "├─", point: "o", mark: "…" };
const ASCII = { through: "| ", branch: "|-", point: "o", mark: "..." };
type Glyphs = typeof UNICODE;

/** The trees of a machine's points, one point a line; with `disks` one more for each disk. */
export function renderTree(lines: readonly PointLine[], page: Page, disks: boolean): string {
  const glyphs = page.isUnicode ? UNICODE : ASCII;
  const zones = new Set(lines.flatMap(({ point }) => (point === undefined ? [] : formatZone(point.created))));
  const [zone] = zones;
  const isOneZone = zones.size === 1 && zone !== undefined;
  const rows = lines.flatMap((line, index): Row[] => {
    const isNewTree = line.link === "root" && index > 0;
    const details = disks && line.point !== undefined ? diskLines(line, line.point, glyphs) : [];
    return [...(isNewTree ? [""] : []), cells(line, glyphs, page, isOneZone), ...details];
  });
  const table = renderTable(
    [
      { title: "  POINT" },
      { title: isOneZone ? `CREATED (${zone})` : "CREATED" },
      { title: "KIND" },
      { title: "STORED", align: "right" },
      { title: "NAME" },
    ],
    rows,
    { width: page.width, mark: glyphs.mark },
  );
  return table + notesOf(lines).join("");
}

function cells(line: PointLine, glyphs: Glyphs, page: Page, isOneZone: boolean): string[] {
  const { point, id } = line;
  const graph = `${graphOf(line, glyphs, page)}${signOf(line, glyphs)} ${id}`;
  if (point === undefined) return [graph, "", line.state];
  const { created } = point;
  return [
    graph,
    isOneZone ? formatMinute(created) : `${formatMinute(created)} ${formatZone(created)}`,
    line.state === "forgotten" ? "(gone)" : kindOf(point),
    formatSize(storedBytes(point)),
    point.name ?? "",
  ];
}

/** What leads to a point: a line for each branch that goes on below it. */
function graphOf({ depth, link }: PointLine, { through, branch }: Glyphs, { width }: Page): string {
  const columns = Number.isFinite(width) ? Math.min(depth, MOST_BRANCHES) : depth;
  return link === "branch" ? through.repeat(columns - 1) + branch : through.repeat(columns);
}

function signOf({ state, current, lacks }: PointLine, { point }: Glyphs): string {
  if (lacks.length > 0) return "!";
  if (state === "forgotten") return "x";
  return current ? "*" : point;
}

/** What there is to say of a point's disks, a line each. */
function diskLines(line: PointLine, { disks, description }: PointManifest, { through }: Glyphs): string[] {
  const indent = `${through.repeat(line.depth)}    `;
  const texts = disks.map((disk) => `${disk.name}: ${describeDisk(disk)}`);
  return [...(description === null ? [] : [description]), ...texts].map((text) => indent + text);
}

function describeDisk({ kind, parent, reason, bytes }: DiskManifest): string {
  const what = parent === null ? kind : `${kind} of ${parent}`;
  return `${what}, ${formatSize(bytes)}${reason === null ? "" : ` (${reason})`}`;
}

/** What the signs before the points mean, each where it began: what needs a damaged point bears its sign, too. */
function notesOf(lines: readonly PointLine[]): string[] {
  const needing = new Map<string, number>();
  for (const { id, lacks } of lines)
    for (const lack of lacks) if (lack !== id) needing.set(lack, (needing.get(lack) ?? 0) + 1);
  return lines.flatMap(({ id, state }) => {
    const count = needing.get(id) ?? 0;
    const points = `${count} ${count === 1 ? "point needs" : "points need"} it`;
    if (state === "unreadable") return [`! ${id}: its manifest cannot be read; ${points}\n`];
    if (state === "missing") return [`! ${id}: it is not there; ${points}\n`];
    if (count > 0) return [`! ${id}: it lacks a disk; ${points}\n`];
    return state === "forgotten" ? [`x ${id}: forgotten, kept for others\n`] : [];
  });
}
