import type { Command } from "commander";
import { formatSize } from "../../bytes/index.js";
import { pointTree, type PointLine } from "../../inspect/index.js";
import { standingPoints } from "../../repository/index.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { report } from "../render/output.js";
import { formatTime, kindOf, pointView, storedBytes } from "../render/point.js";
import { renderTable } from "../render/table.js";
import { machinesAt, repositoryAt } from "../repository.js";

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("[machine]", "only the points of this machine"))
    .addHelpText(
      "after",
      "\nEXAMPLES\n  tidemark list --repo /backup\n  tidemark list web --repo /backup --json",
    )
    .action(async (machine: string | undefined, options: CommonOptions & { repo?: string }) => {
      const repository = await repositoryAt(options, context);
      const { signal } = context;
      const machines = await machinesAt(repository, machine, context);
      const lists = new Map<string, PointLine[]>();
      const problems: Error[] = [];
      for (const name of machines) {
        const { points, unreadable } = await repository.survey(name, { signal });
        lists.set(name, pointTree(standingPoints(points)));
        problems.push(...unreadable.map(({ error }) => error));
      }
      const all = [...lists.values()].flat();
      const oldestFirst = all.toSorted((a, b) => (a.point.id < b.point.id ? -1 : 1));
      const document = oldestFirst.map(({ point, current }) => pointView(point, current));
      report(context, options, document, () => renderLists(lists));
      // What can be read is shown; that not all can be is an error all the same.
      const [problem] = problems;
      if (problem !== undefined) throw problem;
    });
}

function renderLists(lists: ReadonlyMap<string, readonly PointLine[]>): string {
  if (lists.size === 0) return "No points yet. Make one with tidemark backup\n";
  const texts = [...lists].map(([machine, lines]) => `${machine}\n${renderPoints(lines)}`);
  return texts.join("\n");
}

function renderPoints(lines: readonly PointLine[]): string {
  const rows = lines.map(({ point, current, depth }) => [
    `${"  ".repeat(depth)}${current ? "*" : " "} ${point.id}`,
    kindOf(point),
    String(point.disks.length),
    formatSize(storedBytes(point)),
    formatTime(point.created),
    point.name ?? "",
  ]);
  return renderTable(
    [
      { title: "  POINT" },
      { title: "KIND" },
      { title: "DISKS", align: "right" },
      { title: "STORED", align: "right" },
      { title: "CREATED (UTC)" },
      { title: "NAME" },
    ],
    rows,
  );
}
