import type { Command } from "commander";
import { TidemarkError, UsageError } from "../errors/index.js";
import type { Repository } from "../repository/index.js";
import type { ChainChanges, ChangeChainOptions } from "../rewrite/index.js";
import { rateArgument } from "./arguments.js";
import { withRepository, type CliContext, type CommonOptions } from "./context.js";
import { PartlyError } from "./exit-code.js";
import { withEvents } from "./render/output.js";
import { progressFor } from "./render/progress.js";
import { repositoryAt } from "./repository.js";

/** Options of every command that rewrites chains. */
export interface ChangeCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly dryRun?: boolean;
  readonly bandwidth?: number;
}

/** What is to be changed: the machines, and how each is. */
export interface MachineChange {
  readonly machines: readonly string[];
  /** What is done, for people: "thin out". */
  readonly verb: string;
  change(options: ChangeChainOptions): Promise<ChainChanges>;
  /** What was done to a machine, for people. */
  render(changes: ChainChanges, machine: string): string;
}

/** Adds the options of every command that rewrites chains. */
export function withChanges(command: Command): Command {
  return withRepository(command)
    .option("--dry-run", "only say what would be done")
    .option("--bandwidth <rate>", "bytes a second that are moved, e.g. 100MiB/s", rateArgument);
}

/**
 * Changes the chains of machines, one after the other, with progress. One that cannot be changed, since it is being backed
 * up or is damaged, keeps no other from it.
 *
 * @throws {PartlyError} when some were changed, and some not
 */
export async function changeChains(
  options: ChangeCommandOptions,
  context: CliContext,
  find: (repository: Repository) => Promise<MachineChange>,
): Promise<void> {
  const failures = new Map<string, TidemarkError>();
  let verb = "change";
  await withEvents(
    context,
    options,
    async (emit) => {
      const repository = await repositoryAt(options, context);
      const task = await find(repository);
      verb = task.verb;
      const { dryRun, bandwidth } = options;
      const { signal } = context;
      const progress = progressFor(context, options, emit);
      const all = new Map<string, ChainChanges>();
      try {
        for (const machine of task.machines) {
          const observer = {
            progress: (event: { done: number; total: number }): void => {
              if (event.total > 0) progress.update({ disk: machine, ...event });
            },
          };
          try {
            all.set(machine, await task.change({ repository, machine, dryRun, bandwidth, observer, signal }));
          } catch (error) {
            const isOwn = error instanceof TidemarkError && !(error instanceof UsageError);
            if (!isOwn || signal.aborted) throw error;
            failures.set(machine, error);
          }
        }
      } finally {
        progress.stop();
      }
      const [failure] = failures.values();
      if (failure !== undefined && all.size === 0) throw failure;
      if (options.json !== true && options.quiet !== true)
        context.stdout.write([...all].map(([name, changes]) => task.render(changes, name)).join("\n"));
      return together([...all.values()], dryRun === true);
    },
    (changes) => ({ ...changes }),
  );
  if (failures.size > 0) throw new PartlyError(verb, failures);
}

/** The machines' changes as one. */
function together(all: readonly ChainChanges[], dryRun: boolean): ChainChanges {
  return {
    dryRun,
    removed: all.flatMap(({ removed }) => removed),
    forgotten: all.flatMap(({ forgotten }) => forgotten),
    rewritten: all.flatMap(({ rewritten }) => rewritten),
    freedBytes: all.reduce((sum, { freedBytes }) => sum + freedBytes, 0),
    kept: all.flatMap(({ kept }) => kept),
  };
}
