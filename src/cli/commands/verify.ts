import { Option, type Command } from "commander";
import { DamageError } from "../../errors/index.js";
import { parsePointReference } from "../../repository/index.js";
import { verifyMachine, type Problem } from "../../verify/index.js";
import { integerArgument, rateArgument } from "../arguments.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { markReported, withEvents, type EmitEvent } from "../render/output.js";
import { progressFor } from "../render/progress.js";
import { machinesAt, pointAt, repositoryAt } from "../repository.js";

interface VerifyCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly quick?: boolean;
  readonly percent?: number;
  readonly workers?: number;
  readonly bandwidth?: number;
}

/** What was found in all machines. */
interface Findings {
  readonly points: number;
  readonly problems: readonly (Problem & { readonly machine: string })[];
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("[machine[@point]]", "all points of this machine, or what this one needs"))
    .addOption(new Option("--quick", "manifests, links, lengths and tables; no data").conflicts("percent"))
    .option("--percent <n>", "of the data, chosen at random; all else in full", integerArgument(0, 100))
    .option("--workers <n>", "worker threads (default: cores, at most 4)", integerArgument(1, 64))
    .option("--bandwidth <rate>", "bytes a second, e.g. 100MiB/s", rateArgument)
    .addHelpText(
      "after",
      `
EXAMPLES
  tidemark verify --repo /backup
  tidemark verify web@latest --repo /backup
  tidemark verify --percent 5 --repo /backup`,
    )
    .action(async (reference: string | undefined, options: VerifyCommandOptions) => {
      const { problems } = await withEvents(
        context,
        options,
        (emit) => run(reference, options, context, emit),
        ({ points, problems }) => ({ points, ok: problems.length === 0, problems }),
      );
      const [first, ...others] = problems;
      if (first === undefined) return;
      const more = others.length === 0 ? "" : `, and ${others.length} more`;
      const damage = { object: first.point, points: problems.flatMap(({ affects }) => affects) };
      const error = new DamageError("TM_VERIFY_FAILED", `Damage was found: ${first.problem}${more}`, damage);
      throw options.json === true ? markReported(error) : error;
    });
}

async function run(
  reference: string | undefined,
  options: VerifyCommandOptions,
  context: CliContext,
  emit: EmitEvent,
): Promise<Findings> {
  const repository = await repositoryAt(options, context);
  const { signal } = context;
  const { machine, selector } =
    reference === undefined ? { machine: undefined, selector: undefined } : parsePointReference(reference);
  const machines = await machinesAt(repository, machine, context);
  const point =
    reference === undefined || selector === undefined
      ? undefined
      : (await pointAt(repository, reference, {}, context)).point.id;
  const share = options.quick === true ? 0 : (options.percent ?? 100) / 100;
  const found = { points: 0, problems: [] as (Problem & { machine: string })[] };
  const progress = progressFor(context, options, emit);
  const { workers, bandwidth } = options;
  try {
    for (const name of machines) {
      const observer = {
        progress: (event: { done: number; total: number }) => progress.update({ disk: name, ...event }),
        problem: (problem: Problem) => emit({ event: "problem", machine: name, ...problem }),
      };
      const limits = { share, workers, bandwidth };
      const report = await verifyMachine({ repository, machine: name, point, ...limits, observer, signal });
      found.points += report.points;
      found.problems.push(...report.problems.map((problem) => ({ machine: name, ...problem })));
    }
  } finally {
    progress.stop();
  }
  if (options.json !== true && options.quiet !== true) context.stdout.write(render(found));
  return found;
}

function render({ points, problems }: Findings): string {
  const lines = problems.map(({ machine, point, disk, problem, affects }) => {
    const where = `${machine}@${point}${disk === null ? "" : ` ${disk}`}`;
    const lost = affects.length === 0 ? "no point is lost" : `cannot be restored: ${affects.join(", ")}`;
    return `${where}: ${problem}; ${lost}`;
  });
  lines.push(`${points} points, ${problems.length === 0 ? "all well" : `${problems.length} problems`}`);
  return `${lines.join("\n")}\n`;
}
