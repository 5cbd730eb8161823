import type { Command } from "commander";
import { TidemarkError, UsageError } from "../../errors/index.js";
import type { RetentionPolicy } from "../../retention/index.js";
import { prunePoints, type ChainChanges } from "../../rewrite/index.js";
import { durationArgument, integerArgument, repeatedArgument } from "../arguments.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { PartlyError } from "../exit-code.js";
import { renderChanges } from "../render/changes.js";
import { report } from "../render/output.js";
import { renderTable } from "../render/table.js";
import { machinesAt, repositoryAt } from "../repository.js";

interface PruneCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly keepLast?: number;
  readonly keepHourly?: number;
  readonly keepDaily?: number;
  readonly keepWeekly?: number;
  readonly keepMonthly?: number;
  readonly keepYearly?: number;
  readonly keepWithin?: number;
  readonly keepName?: readonly string[];
  readonly utc?: boolean;
  readonly dryRun?: boolean;
}

const count = integerArgument(0, 1_000_000);

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("[machine]", "only the points of this machine"))
    .option("--keep-last <n>", "the newest points", count)
    .option("--keep-hourly <n>", "the newest point of each of the newest n hours that have one", count)
    .option("--keep-daily <n>", "… of each of n days", count)
    .option("--keep-weekly <n>", "… of each of n weeks (from Monday on)", count)
    .option("--keep-monthly <n>", "… of each of n months", count)
    .option("--keep-yearly <n>", "… of each of n years", count)
    .option("--keep-within <duration>", "points that are not older, e.g. 7d", durationArgument)
    .option(
      "--keep-name <pattern>",
      "points of such names (* and ? as in a shell; repeatable)",
      repeatedArgument,
    )
    .option("--utc", "hours, days … of UTC instead of local time")
    .option("--dry-run", "only say what would be done")
    .addHelpText(
      "after",
      `
What any rule keeps is kept, and the newest point always. The data of those that go moves into the points that need it.

EXAMPLES
  tidemark prune web --keep-last 7 --keep-weekly 4 --keep-monthly 12 --repo /backup --dry-run`,
    )
    .action(async (machine: string | undefined, options: PruneCommandOptions) => {
      const repository = await repositoryAt(options, context);
      const { signal } = context;
      const machines = await machinesAt(repository, machine, context);
      const policy = policyOf(options);
      const timeZone = options.utc === true ? "UTC" : localTimeZone();
      const { dryRun } = options;
      const all = new Map<string, ChainChanges>();
      const failures = new Map<string, TidemarkError>();
      for (const name of machines) {
        const place = { repository, machine: name, dryRun, signal };
        try {
          all.set(name, await prunePoints({ ...place, policy, timeZone, now: new Date() }));
        } catch (error) {
          // One machine that is being backed up just now must not keep the others from being thinned out.
          const isOwn = error instanceof TidemarkError && !(error instanceof UsageError);
          if (!isOwn || signal.aborted) throw error;
          failures.set(name, error);
        }
      }
      const [failure] = failures.values();
      if (failure !== undefined && all.size === 0) throw failure;
      report(context, options, merge([...all.values()], dryRun === true), () =>
        [...all].map(([name, changes]) => renderPlan(name, changes)).join("\n"),
      );
      if (failure !== undefined) throw new PartlyError("thin out", failures);
    });
}

/** UTC where the system's zone is none that is known: an empty TZ means that, too. */
function localTimeZone(): string {
  const { timeZone } = new Intl.DateTimeFormat().resolvedOptions();
  // The types say that there is always one.
  const isKnown = (timeZone as string | undefined) !== undefined && timeZone !== "Etc/Unknown";
  return isKnown ? timeZone : "UTC";
}

function policyOf(options: PruneCommandOptions): RetentionPolicy {
  return {
    ...(options.keepLast === undefined ? {} : { last: options.keepLast }),
    ...(options.keepHourly === undefined ? {} : { hourly: options.keepHourly }),
    ...(options.keepDaily === undefined ? {} : { daily: options.keepDaily }),
    ...(options.keepWeekly === undefined ? {} : { weekly: options.keepWeekly }),
    ...(options.keepMonthly === undefined ? {} : { monthly: options.keepMonthly }),
    ...(options.keepYearly === undefined ? {} : { yearly: options.keepYearly }),
    within: options.keepWithin,
    names: options.keepName,
  };
}

/** The machines' changes as one. */
function merge(all: readonly ChainChanges[], dryRun: boolean): ChainChanges {
  return {
    dryRun,
    removed: all.flatMap(({ removed }) => removed),
    rewritten: all.flatMap(({ rewritten }) => rewritten),
    kept: all.flatMap(({ kept }) => kept),
  };
}

function renderPlan(machine: string, changes: ChainChanges): string {
  const { dryRun, kept, removed, rewritten } = changes;
  const verdicts = [
    ...kept.map(({ id, reasons }) => [id, "keep", reasons.join(", ")]),
    ...removed.map((id) => [id, dryRun ? "remove" : "removed", ""]),
  ].sort(([a = ""], [b = ""]) => (a < b ? -1 : 1));
  const table = renderTable([{ title: "POINT" }, { title: "VERDICT" }, { title: "WHY" }], verdicts);
  const isIdle = removed.length + rewritten.length === 0;
  const moved = isIdle || rewritten.length > 0 ? renderChanges({ ...changes, removed: [] }, machine) : "";
  return `${machine}\n${table}${moved}`;
}
