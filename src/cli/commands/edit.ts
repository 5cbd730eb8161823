import type { Command } from "commander";
import { UsageError } from "../../errors/index.js";
import { editPoint } from "../../rewrite/index.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { report } from "../render/output.js";
import { pointView } from "../render/point.js";
import { pointAt, repositoryAt, requirePoint } from "../repository.js";

interface EditCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly name?: string;
  readonly description?: string;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine@point>", "an id, a prefix of one, a name, latest, latest~N"))
    .option("--name <text>", 'a name, unique within the machine; "" takes it away')
    .option("--description <text>", 'words about the point; "" takes them away')
    .addHelpText("after", "\nEXAMPLES\n  tidemark edit web@latest --name before-upgrade --repo /backup")
    .action(async (reference: string, options: EditCommandOptions) => {
      const { name, description } = options;
      if (name === undefined && description === undefined) {
        throw new UsageError("Nothing is to be changed", { hint: "Give --name or --description" });
      }
      const repository = await repositoryAt(options, context);
      const { point, points } = await pointAt(repository, requirePoint(reference), {}, context);
      const machine = point.machine.name;
      const { signal } = context;
      const edited = await editPoint({ repository, machine, point: point.id, name, description, signal });
      const isCurrent = points.at(-1)?.id === edited.id;
      const named = edited.name === null ? "no name" : `the name ${JSON.stringify(edited.name)}`;
      report(context, options, pointView(edited, isCurrent), () => `${machine}@${edited.id} has ${named}\n`);
    });
}
