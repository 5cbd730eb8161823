import type { Command } from "commander";
import { pointTree, type PointLine } from "../../inspect/index.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { report } from "../render/output.js";
import { pointView } from "../render/point.js";
import { pageOf } from "../render/terminal.js";
import { renderTree } from "../render/tree.js";
import { machinesAt, repositoryAt } from "../repository.js";

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("[machine]", "only the points of this machine"))
    .addHelpText(
      "after",
      `
A point follows the one that it goes on from; a branch stands below the point that it leaves. * is the current one, ! cannot be
restored, x was forgotten and stays for others. Long lines are cut to a terminal's width, unless --verbose is given.

EXAMPLES
  tidemark list --repo /backup
  tidemark list web --repo /backup --json`,
    )
    .action(async (machine: string | undefined, options: CommonOptions & { repo?: string }) => {
      const repository = await repositoryAt(options, context);
      const { signal } = context;
      const machines = await machinesAt(repository, machine, context);
      const lists = new Map<string, PointLine[]>();
      const problems: Error[] = [];
      for (const name of machines) {
        const survey = await repository.survey(name, { signal });
        lists.set(name, pointTree(survey));
        problems.push(...survey.unreadable.map(({ error }) => error));
      }
      const all = [...lists.values()].flat();
      const document = all
        .flatMap(({ point, state, current }) =>
          point === undefined || state !== "standing" ? [] : [{ point, current }],
        )
        .sort((a, b) => (a.point.id < b.point.id ? -1 : 1))
        .map(({ point, current }) => pointView(point, current));
      report(context, options, document, () => renderLists(lists, context, options));
      // What can be read is shown; that not all can be is an error all the same.
      const [problem] = problems;
      if (problem !== undefined) throw problem;
    });
}

function renderLists(
  lists: ReadonlyMap<string, readonly PointLine[]>,
  context: CliContext,
  options: CommonOptions,
): string {
  if (lists.size === 0) return "No points yet. Make one with tidemark backup\n";
  const page = pageOf(context, options);
  const texts = [...lists].map(
    ([machine, lines]) => `${machine}\n${renderTree(lines, page, options.verbose === true)}`,
  );
  return texts.join("\n");
}
