import type { Command } from "commander";
import { leftoverLines } from "../../inspect/index.js";
import { checkpointsOf, openLiveMachine, recover } from "../../machine/index.js";
import {
  requireMachineForRepository,
  runDirectory,
  withRepository,
  type CliContext,
  type CommonOptions,
} from "../context.js";
import { monitorAt } from "../monitor.js";
import { report } from "../render/output.js";
import { repositoryAt } from "../repository.js";

interface CleanupOptions extends CommonOptions {
  readonly repo?: string;
  readonly qmp: string;
  readonly machine?: string;
  readonly dryRun?: boolean;
  readonly unknownRuns?: boolean;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command)
    .requiredOption("--qmp <socket>", "the machine's QMP monitor")
    .option("--machine <name>", "its name in the repository: lets the repository decide about bitmaps")
    .option("--dry-run", "only list what would be removed")
    .option("--unknown-runs", "also what belongs to runs that nothing is known of: only when none is alive")
    .addHelpText(
      "after",
      `
EXAMPLES
  tidemark cleanup --qmp /run/vm/web.qmp --dry-run
  tidemark cleanup --qmp /run/vm/web.qmp --machine web --repo /backup`,
    )
    .action(async (options: CleanupOptions) => {
      await cleanUp(options, context);
    });
}

async function cleanUp(options: CleanupOptions, context: CliContext): Promise<void> {
  const { machine: name, dryRun = false } = options;
  const { signal } = context;
  const address = monitorAt(options.qmp);
  const isNamed = options.repo !== undefined || context.environment["TIDEMARK_REPO"] !== undefined;
  requireMachineForRepository(options);
  const repository = name !== undefined && isNamed ? await repositoryAt(options, context) : undefined;
  await using machine = await openLiveMachine({
    address,
    runDirectory: runDirectory(context),
    lookOnly: dryRun,
    signal,
  });
  const leftovers = await recover(machine, {
    dryRun,
    unknownRuns: options.unknownRuns === true ? "clean" : "refuse",
    checkpoints:
      repository === undefined || name === undefined
        ? undefined
        : checkpointsOf(repository, name, { signal }),
    signal,
  });
  const lines = leftoverLines(leftovers);
  report(context, options, { dryRun, removed: lines }, () => {
    if (lines.length === 0) return "Nothing is left of dead runs\n";
    const verb = dryRun ? "Would remove" : "Removed";
    const unsure = " (its run may be alive: it is not known here)";
    return lines
      .map(
        ({ kind, name: what, mayBeAlive }) =>
          `${verb} ${kind} ${what}${dryRun && mayBeAlive ? unsure : ""}\n`,
      )
      .join("");
  });
}
