import { BusyError, DamageError, NotFoundError, TidemarkError, UsageError } from "../errors/index.js";

/** Exit codes, a contract with scripts. */
export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  partly: 3,
  notFound: 4,
  busy: 5,
  damage: 6,
  interrupted: 130,
} as const;

/** What the help of every command ends with. */
export const EXIT_STATUS_HELP = `
EXIT STATUS
  0 done   1 failed   2 wrong usage   3 done in part   4 repository, machine or point not found
  5 locked or busy with another run   6 damage found   130 interrupted`;

/** The user (or the system) ended the command by a signal. */
export class InterruptedError extends TidemarkError {
  constructor(signal: string) {
    super("TM_INTERRUPTED", `Interrupted by ${signal}`);
  }
}

/** Of several machines some were done, some not. */
export class PartlyError extends TidemarkError {
  /** @param failures by machine */
  constructor(verb: string, failures: ReadonlyMap<string, TidemarkError>) {
    const all = [...failures].map(([machine, { message }]) => `machine "${machine}": ${message}`);
    const [first] = failures.values();
    super("TM_PARTLY", `Cannot ${verb} all machines: ${all.join("; ")}`, {
      cause: first,
      hint: first?.hint,
    });
  }
}

/** Nobody reads standard output any more. */
export class OutputError extends TidemarkError {
  constructor(cause: Error) {
    super("TM_OUTPUT", `Cannot write to standard output: ${cause.message}`, { cause });
  }
}

/** The one place where an error becomes an exit code. */
export function exitCodeOf(error: unknown): number {
  if (error instanceof InterruptedError) return EXIT.interrupted;
  if (error instanceof PartlyError) return EXIT.partly;
  if (error instanceof UsageError) return EXIT.usage;
  if (error instanceof NotFoundError) return EXIT.notFound;
  if (error instanceof BusyError) return EXIT.busy;
  if (error instanceof DamageError) return EXIT.damage;
  return EXIT.failed;
}
