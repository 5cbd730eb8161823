import { Option, type Command } from "commander";
import { deletePoint, type DeleteScope } from "../../rewrite/index.js";
import { changeChains, withChanges, type ChangeCommandOptions } from "../chain-change.js";
import type { CliContext } from "../context.js";
import { renderChanges } from "../render/changes.js";
import { pointAt, requirePoint } from "../repository.js";

interface DeleteCommandOptions extends ChangeCommandOptions {
  readonly children?: boolean;
  readonly childrenOnly?: boolean;
  readonly metadataOnly?: boolean;
  readonly force?: boolean;
}

export function declare(command: Command, context: CliContext): void {
  withChanges(command.argument("<machine@point>", "an id, a prefix of one, a name, latest, latest~N"))
    .addOption(
      new Option("--children", "and all points after it").conflicts(["childrenOnly", "metadataOnly"]),
    )
    .addOption(new Option("--children-only", "all points after it, but not it").conflicts("metadataOnly"))
    .option("--metadata-only", "forget it, but leave its images where they are")
    .option("--force", "also if the current point goes: the next backup is full then, or compares")
    .addHelpText(
      "after",
      `
What other points need of the deleted one moves into them: every other point can be restored as before.

EXAMPLES
  tidemark delete web@latest~5 --repo /backup
  tidemark delete web@before-upgrade --children-only --repo /backup --dry-run`,
    )
    .action(async (reference: string, options: DeleteCommandOptions) => {
      await changeChains(options, context, async (repository) => {
        const { point } = await pointAt(repository, requirePoint(reference), {}, context);
        const { force } = options;
        return {
          machines: [point.machine.name],
          verb: "delete",
          change: (change) => deletePoint({ ...change, point: point.id, scope: scopeOf(options), force }),
          render: renderChanges,
        };
      });
    });
}

function scopeOf({ children, childrenOnly, metadataOnly }: DeleteCommandOptions): DeleteScope {
  if (children === true) return "children";
  if (childrenOnly === true) return "children-only";
  return metadataOnly === true ? "metadata-only" : "point";
}
