import { Command, CommanderError, Option } from "commander";
import { UsageError } from "../errors/index.js";
import type { CliContext, CommandModule } from "./context.js";
import { EXIT_STATUS_HELP } from "./exit-code.js";
import { VERSION } from "./version.js";

/** Every command, with what the overview says of it. A command's module is loaded only when it is the one to run. */
const COMMANDS: readonly { name: string; summary: string; load: () => Promise<CommandModule> }[] = [
  { name: "init", summary: "make a repository", load: () => import("./commands/init.js") },
  {
    name: "backup",
    summary: "back up a machine, running or off",
    load: () => import("./commands/backup.js"),
  },
  { name: "list", summary: "the points, as a tree", load: () => import("./commands/list.js") },
  { name: "show", summary: "one point: disks, sizes, why full", load: () => import("./commands/show.js") },
  { name: "restore", summary: "write a point's disks to files", load: () => import("./commands/restore.js") },
  {
    name: "serve",
    summary: "a point's disks over NBD, read-only",
    load: () => import("./commands/serve.js"),
  },
  { name: "verify", summary: "whether all is as it was stored", load: () => import("./commands/verify.js") },
  { name: "edit", summary: "name or describe a point", load: () => import("./commands/edit.js") },
  {
    name: "delete",
    summary: "forget a point, and keep all others restorable",
    load: () => import("./commands/delete.js"),
  },
  { name: "flatten", summary: "make a point's images full", load: () => import("./commands/flatten.js") },
  { name: "prune", summary: "thin out by retention rules", load: () => import("./commands/prune.js") },
  {
    name: "compact",
    summary: "write images anew without garbage",
    load: () => import("./commands/compact.js"),
  },
  {
    name: "status",
    summary: "what QEMU carries, what the next backup does",
    load: () => import("./commands/status.js"),
  },
  {
    name: "cleanup",
    summary: "remove what a dead run left in QEMU",
    load: () => import("./commands/cleanup.js"),
  },
];

/** Runs the command line. @throws whatever the command throws; wrong usage as {UsageError} */
export async function runProgram(args: readonly string[], context: CliContext): Promise<void> {
  const program = new Command("tidemark")
    .description("Incremental backups of QEMU virtual machines, as plain qcow2 chains")
    .version(VERSION)
    .addHelpText("after", EXIT_STATUS_HELP)
    .helpCommand(false)
    .exitOverride()
    .configureOutput({
      writeOut: (text) => context.stdout.write(text),
      writeErr: () => undefined,
    });
  const words = args[0] === "help" ? [...args.slice(1), "--help"] : args;
  const wanted = words.find((argument) => !argument.startsWith("-"));
  for (const { name, summary, load } of COMMANDS) {
    const command = program.command(name).description(summary).exitOverride();
    if (name !== wanted) continue;
    const module = await load();
    module.declare(command, context);
    command
      .option("--json", "machine-readable output")
      .option("--quiet", "print nothing but errors")
      .addOption(new Option("--verbose", "say more").conflicts("quiet"))
      .option("--no-progress", "no progress bars")
      .addHelpText("after", EXIT_STATUS_HELP);
  }
  if (args.length === 0) {
    program.outputHelp();
    return;
  }
  try {
    await program.parseAsync(words, { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    if (error.exitCode === 0) return;
    throw new UsageError(describe(error), { cause: error, hint: hintFor(wanted, words) });
  }
}

/** Commander's sentence as one of ours: one line, without its prefix and full stop. */
function describe({ message }: CommanderError): string {
  return message
    .replace(/^error: /, "")
    .replace(/\n\((.*)\)$/, ". $1")
    .replace(/\.$/, "");
}

function hintFor(wanted: string | undefined, words: readonly string[]): string {
  const isCommand = COMMANDS.some(({ name }) => name === wanted);
  if (isCommand && wanted === words[0]) return `See tidemark ${wanted} --help`;
  return words[0]?.startsWith("-") === true
    ? "Options stand behind the command; see tidemark --help"
    : "See tidemark --help";
}
