#!/usr/bin/env node
import type { CliContext } from "./context.js";
import { exitCodeOf } from "./exit-code.js";
import { neverWait } from "./never-wait.js";
import { runProgram } from "./program.js";
import { renderError } from "./render/error.js";
import { isReported } from "./render/output.js";
import { abortFromOutside } from "./signals.js";

for (const stream of [process.stdout, process.stderr]) neverWait(stream);
const context: CliContext = {
  stdout: process.stdout,
  stderr: process.stderr,
  environment: process.env,
  signal: abortFromOutside(process),
};
const args = process.argv.slice(2);

try {
  await runProgram(args, context);
} catch (error) {
  const [json, verbose] = [args.includes("--json"), args.includes("--verbose")];
  if (!isReported(error)) process.stderr.write(renderError(error, { json, verbose }));
  process.exitCode = exitCodeOf(error);
}
