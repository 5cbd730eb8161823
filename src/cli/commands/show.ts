import type { Command } from "commander";
import { chainOf, restoreCost } from "../../inspect/index.js";
import { childrenOf, currentPoint, standingPoints } from "../../repository/index.js";
import { timeArgument } from "../arguments.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { report } from "../render/output.js";
import { pointView } from "../render/point.js";
import { renderPoint } from "../render/point-page.js";
import { pointAt, repositoryAt } from "../repository.js";

interface ShowOptions extends CommonOptions {
  readonly repo?: string;
  readonly at?: Date;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine[@point]>", "an id, a prefix of one, a name, latest, latest~N"))
    .option("--at <time>", "the newest point at or before this time", timeArgument)
    .addHelpText(
      "after",
      `
GARBAGE is what an image holds that nothing refers to any more. READ is the stored data that a restore of the point reads, of
its own image and of those below; with --verbose, image by image.

EXAMPLES
  tidemark show web --repo /backup
  tidemark show web@latest~3 --repo /backup --json`,
    )
    .action(async (reference: string, options: ShowOptions) => {
      const repository = await repositoryAt(options, context);
      const { point, points } = await pointAt(repository, reference, options, context);
      const isCurrent = currentPoint(standingPoints(points)) === point;
      const chain = chainOf(points, point);
      const children = childrenOf(points, point.id).map(({ id }) => id);
      const restore = await restoreCost(repository, point, { signal: context.signal });
      const document = { ...pointView(point, isCurrent), chain, children, restore };
      const page = { point, isCurrent, points, chain, children, restore };
      report(context, options, document, () => renderPoint(page, options.verbose === true));
    });
}
