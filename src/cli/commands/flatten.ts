import type { Command } from "commander";
import { flattenPoint } from "../../rewrite/index.js";
import { changeChains, withChanges, type ChangeCommandOptions } from "../chain-change.js";
import type { CliContext } from "../context.js";
import { renderChanges } from "../render/changes.js";
import { pointAt, requirePoint } from "../repository.js";

export function declare(command: Command, context: CliContext): void {
  withChanges(command.argument("<machine@point>", "an id, a prefix of one, a name, latest, latest~N"))
    .addHelpText(
      "after",
      `
The point's images become full, from what the repository holds: the points before it can go then without a cost.

EXAMPLES
  tidemark flatten web@latest --repo /backup`,
    )
    .action(async (reference: string, options: ChangeCommandOptions) => {
      await changeChains(options, context, async (repository) => {
        const { point } = await pointAt(repository, requirePoint(reference), {}, context);
        return {
          machines: [point.machine.name],
          verb: "flatten",
          change: (change) => flattenPoint({ ...change, point: point.id }),
          render: renderChanges,
        };
      });
    });
}
