import { Option, type Command } from "commander";
import { deletePoint, type DeleteScope } from "../../rewrite/index.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { renderChanges } from "../render/changes.js";
import { report } from "../render/output.js";
import { pointAt, repositoryAt, requirePoint } from "../repository.js";

interface DeleteCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly children?: boolean;
  readonly childrenOnly?: boolean;
  readonly metadataOnly?: boolean;
  readonly force?: boolean;
  readonly dryRun?: boolean;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine@point>", "an id, a prefix of one, a name, latest, latest~N"))
    .addOption(
      new Option("--children", "and all points after it").conflicts(["childrenOnly", "metadataOnly"]),
    )
    .addOption(new Option("--children-only", "all points after it, but not it").conflicts("metadataOnly"))
    .option("--metadata-only", "forget it, but leave its images where they are")
    .option("--force", "also if the current point goes: the next backup is full then, or compares")
    .option("--dry-run", "only say what would be done")
    .addHelpText(
      "after",
      `
What other points need of the deleted one moves into them: every other point can be restored as before.

EXAMPLES
  tidemark delete web@latest~5 --repo /backup
  tidemark delete web@before-upgrade --children-only --repo /backup --dry-run`,
    )
    .action(async (reference: string, options: DeleteCommandOptions) => {
      const repository = await repositoryAt(options, context);
      const { point } = await pointAt(repository, requirePoint(reference), {}, context);
      const { force, dryRun } = options;
      const machine = point.machine.name;
      const { signal } = context;
      const scope = scopeOf(options);
      const changes = await deletePoint({
        repository,
        machine,
        point: point.id,
        scope,
        force,
        dryRun,
        signal,
      });
      report(context, options, changes, () => renderChanges(changes, machine));
    });
}

function scopeOf({ children, childrenOnly, metadataOnly }: DeleteCommandOptions): DeleteScope {
  if (children === true) return "children";
  if (childrenOnly === true) return "children-only";
  return metadataOnly === true ? "metadata-only" : "point";
}
