import type { Command } from "commander";
import type { RetentionPolicy } from "../../retention/index.js";
import { prunePoints, type ChainChanges } from "../../rewrite/index.js";
import { durationArgument, integerArgument, repeatedArgument } from "../arguments.js";
import { changeChains, withChanges, type ChangeCommandOptions } from "../chain-change.js";
import type { CliContext } from "../context.js";
import { renderChanges } from "../render/changes.js";
import { renderTable } from "../render/table.js";
import { machinesAt } from "../repository.js";

interface PruneCommandOptions extends ChangeCommandOptions {
  readonly keepLast?: number;
  readonly keepHourly?: number;
  readonly keepDaily?: number;
  readonly keepWeekly?: number;
  readonly keepMonthly?: number;
  readonly keepYearly?: number;
  readonly keepWithin?: number;
  readonly keepName?: readonly string[];
  readonly utc?: boolean;
}

const count = integerArgument(0, 1_000_000);

export function declare(command: Command, context: CliContext): void {
  withChanges(command.argument("[machine]", "only the points of this machine"))
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
    .addHelpText(
      "after",
      `
What any rule keeps is kept, and the newest point always. The data of those that go moves into the points that need it.

EXAMPLES
  tidemark prune web --keep-last 7 --keep-weekly 4 --keep-monthly 12 --repo /backup --dry-run`,
    )
    .action(async (machine: string | undefined, options: PruneCommandOptions) => {
      await changeChains(options, context, async (repository) => {
        const machines = await machinesAt(repository, machine, context);
        const policy = policyOf(options);
        const timeZone = options.utc === true ? "UTC" : localTimeZone();
        return {
          machines,
          verb: "thin out",
          change: (change) => prunePoints({ ...change, policy, timeZone, now: new Date() }),
          render: renderPlan,
        };
      });
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

function renderPlan(changes: ChainChanges, machine: string): string {
  const { dryRun, kept, removed, forgotten } = changes;
  const verdicts = [
    ...kept.map(({ id, reasons }) => [id, "keep", reasons.join(", ")]),
    ...removed.map((id) => {
      const why = forgotten.includes(id) ? "forgotten only: others need its images" : "";
      return [id, dryRun ? "remove" : "removed", why];
    }),
  ].sort(([a = ""], [b = ""]) => (a < b ? -1 : 1));
  const table = renderTable([{ title: "POINT" }, { title: "VERDICT" }, { title: "WHY" }], verdicts);
  return `${machine}\n${table}${renderChanges(changes, machine, false)}`;
}
