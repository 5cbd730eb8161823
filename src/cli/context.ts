import type { Command } from "commander";
import { UsageError } from "../errors/index.js";

/** What a command gets from the world around it, so that nothing below reads process state. */
export interface CliContext {
  readonly stdout: NodeJS.WriteStream;
  readonly stderr: NodeJS.WriteStream;
  readonly environment: NodeJS.ProcessEnv;
  /** Fires when the user interrupts. */
  readonly signal: AbortSignal;
  /** Fires when the user interrupts once more. */
  readonly hurry: AbortSignal;
}

/** One command: a file in commands/ each. */
export interface CommandModule {
  /** Adds the command's options and its action. */
  declare(command: Command, context: CliContext): void;
}

/** Options that every command takes. */
export interface CommonOptions {
  readonly json?: boolean;
  readonly quiet?: boolean;
  readonly verbose?: boolean;
  readonly progress?: boolean;
}

/** Adds `--repo`. */
export function withRepository(command: Command): Command {
  return command.option("--repo <where>", "the repository: a directory (default: $TIDEMARK_REPO)");
}

/** The repository that a command works on. @throws {UsageError} when none was named */
export function repositoryOf(options: { readonly repo?: string }, context: CliContext): string {
  const where = options.repo ?? context.environment["TIDEMARK_REPO"];
  if (where !== undefined && where !== "") return where;
  throw new UsageError("No repository was named", { hint: "Give --repo <directory>, or set TIDEMARK_REPO" });
}

/** @throws {UsageError} when a repository is named, but not the machine that is to be looked up in it */
export function requireMachineForRepository(options: {
  readonly repo?: string;
  readonly machine?: string;
}): void {
  if (options.repo === undefined || options.machine !== undefined) return;
  throw new UsageError("--repo says nothing without the machine's name in it", {
    hint: "Give --machine, too",
  });
}

/**
 * Where runs keep their state and locks on this host: the same for one user, whether from a login or from cron, since
 * a run must find what another one left. So root's is not that of the session.
 */
export function runDirectory({ environment }: CliContext): string {
  const user = process.geteuid?.() ?? 0;
  const session = environment["XDG_RUNTIME_DIR"] || `/run/user/${user}`;
  const parent = environment["TIDEMARK_RUNTIME_DIR"] || (user === 0 ? "/run" : session);
  return `${parent}/tidemark`;
}
