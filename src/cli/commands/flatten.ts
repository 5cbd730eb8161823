import type { Command } from "commander";
import { flattenPoint } from "../../rewrite/index.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { renderChanges } from "../render/changes.js";
import { report } from "../render/output.js";
import { pointAt, repositoryAt, requirePoint } from "../repository.js";

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine@point>", "an id, a prefix of one, a name, latest, latest~N"))
    .option("--dry-run", "only say what would be done")
    .addHelpText(
      "after",
      `
The point's images become full, from what the repository holds: the points before it can go then without a cost.

EXAMPLES
  tidemark flatten web@latest --repo /backup`,
    )
    .action(async (reference: string, options: CommonOptions & { repo?: string; dryRun?: boolean }) => {
      const repository = await repositoryAt(options, context);
      const { point } = await pointAt(repository, requirePoint(reference), {}, context);
      const machine = point.machine.name;
      const { signal } = context;
      const changes = await flattenPoint({
        repository,
        machine,
        point: point.id,
        dryRun: options.dryRun,
        signal,
      });
      report(context, options, changes, () => renderChanges(changes, machine));
    });
}
