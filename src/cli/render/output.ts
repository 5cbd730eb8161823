import type { CliContext, CommonOptions } from "../context.js";
import { OutputError } from "../exit-code.js";
import { errorEvent } from "./error.js";

/** Marks an error that was printed already, as the last event of a long-running command. */
const reported = new WeakSet();

/** Whether an error is on standard output already. */
export function isReported(error: unknown): boolean {
  return typeof error === "object" && error !== null && reported.has(error);
}

/** Marks an error as printed: it only decides the exit code. */
export function markReported<E extends Error>(error: E): E {
  reported.add(error);
  return error;
}

/** Waits until a stream has taken all that was written to it, or failed to: its listeners are told of that before. */
export async function taken(stream: NodeJS.WriteStream): Promise<void> {
  await new Promise<void>((resolve) => stream.write("", () => resolve()));
  // An error is told in the next turn.
  await new Promise(setImmediate);
}

/** Prints one JSON document, or text for people. */
export function report(
  context: CliContext,
  options: CommonOptions,
  document: unknown,
  text: () => string,
): void {
  if (options.json === true) context.stdout.write(`${JSON.stringify(document)}\n`);
  else if (options.quiet !== true) context.stdout.write(text());
}

/** One JSON object a line. */
export type EmitEvent = (event: Readonly<Record<string, unknown>>) => void;

/** Runs a long-running command; with `--json` its last line is its result or its error. */
export async function withEvents<T>(
  context: CliContext,
  options: CommonOptions,
  run: (emit: EmitEvent) => Promise<T>,
  result: (value: T) => Readonly<Record<string, unknown>>,
): Promise<T> {
  const emit: EmitEvent = (event) => {
    if (options.json === true) context.stdout.write(`${JSON.stringify(event)}\n`);
  };
  try {
    const value = await run(emit);
    emit({ event: "result", ...result(value) });
    return value;
  } catch (error) {
    // Where nobody reads standard output any more, standard error has to say it.
    if (options.json === true && !(error instanceof OutputError)) {
      emit(errorEvent(error));
      if (typeof error === "object" && error !== null) reported.add(error);
    }
    throw error;
  }
}
