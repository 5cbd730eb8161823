#!/usr/bin/env node
import type { CliContext } from "./context.js";
import { exitCodeOf, OutputError } from "./exit-code.js";
import { neverWait } from "./never-wait.js";
import { runProgram } from "./program.js";
import { renderError } from "./render/error.js";
import { isReported, taken } from "./render/output.js";
import { abortFromOutside, endSoon } from "./signals.js";

for (const stream of [process.stdout, process.stderr]) neverWait(stream);
const context: CliContext = {
  stdout: process.stdout,
  stderr: process.stderr,
  environment: process.env,
  ...abortFromOutside(process),
};
const args = process.argv.slice(2);

try {
  await runProgram(args, context);
  await taken(process.stdout);
  // A report that did not arrive is none.
  if (context.signal.reason instanceof OutputError) throw context.signal.reason;
} catch (error) {
  const [json, verbose] = [args.includes("--json"), args.includes("--verbose")];
  if (!isReported(error)) process.stderr.write(renderError(error, { json, verbose }));
  process.exitCode = exitCodeOf(error);
}
if (context.signal.aborted) endSoon();
