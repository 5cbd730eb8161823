import { messageOf, TidemarkError } from "../../errors/index.js";
import { exitCodeOf } from "../exit-code.js";

/** The JSON shape of an error, on stderr of a reporting command and as the last event of a long-running one. */
export function errorEvent(error: unknown): Record<string, unknown> {
  const known = error instanceof TidemarkError ? error : undefined;
  return {
    event: "error",
    code: known?.code ?? "TM_INTERNAL",
    message: messageOf(error),
    hint: known?.hint ?? null,
    exitCode: exitCodeOf(error),
  };
}

/** An error as the user reads it: what happened, what to do; its causes when asked for more. */
export function renderError(
  error: unknown,
  options: { readonly json: boolean; readonly verbose: boolean },
): string {
  if (options.json) return `${JSON.stringify(errorEvent(error))}\n`;
  const lines = [`tidemark: ${messageOf(error)}`];
  if (error instanceof TidemarkError && error.hint !== undefined) lines.push(`  ${error.hint}`);
  // A bug of ours shows its stack: there is no better hint.
  if (!(error instanceof TidemarkError) && error instanceof Error) lines.push(error.stack ?? "");
  else if (options.verbose) {
    for (let cause = (error as Error).cause; cause instanceof Error; cause = cause.cause)
      lines.push(`  because: ${cause.message}`);
  }
  return `${lines.join("\n")}\n`;
}
