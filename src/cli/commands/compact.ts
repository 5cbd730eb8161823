import type { Command } from "commander";
import { parsePointReference } from "../../repository/index.js";
import { compactPoints, DEFAULT_GARBAGE_SHARE } from "../../rewrite/index.js";
import { integerArgument } from "../arguments.js";
import { changeChains, withChanges, type ChangeCommandOptions } from "../chain-change.js";
import type { CliContext } from "../context.js";
import { renderChanges } from "../render/changes.js";
import { machinesAt, pointAt } from "../repository.js";

interface CompactCommandOptions extends ChangeCommandOptions {
  readonly threshold?: number;
}

export function declare(command: Command, context: CliContext): void {
  withChanges(command.argument("[machine[@point]]", "only the points of this machine, or this one"))
    .option(
      "--threshold <percent>",
      `images of which more than this is garbage (default: ${DEFAULT_GARBAGE_SHARE * 100})`,
      integerArgument(0, 99),
    )
    .addHelpText(
      "after",
      `
Images are written anew without what nothing refers to any more: what merges left in them. Every point reads as before.

EXAMPLES
  tidemark compact --repo /backup --dry-run
  tidemark compact web --threshold 25 --repo /backup`,
    )
    .action(async (reference: string | undefined, options: CompactCommandOptions) => {
      await changeChains(options, context, async (repository) => {
        const { machine, selector } =
          reference === undefined
            ? { machine: undefined, selector: undefined }
            : parsePointReference(reference);
        const machines = await machinesAt(repository, machine, context);
        const found =
          reference === undefined || selector === undefined
            ? undefined
            : await pointAt(repository, reference, {}, context);
        const share = options.threshold === undefined ? undefined : options.threshold / 100;
        return {
          machines,
          verb: "compact",
          change: (change) => compactPoints({ ...change, point: found?.point.id, share }),
          render: renderChanges,
        };
      });
    });
}
