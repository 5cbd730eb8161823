#!/usr/bin/env node
import type { CliContext } from "./context.js";
import { exitCodeOf } from "./exit-code.js";
import { runProgram } from "./program.js";
import { renderError } from "./render/error.js";
import { abortOnSignals } from "./signals.js";

const context: CliContext = {
  stdout: process.stdout,
  stderr: process.stderr,
  environment: process.env,
  signal: abortOnSignals(),
};
const args = process.argv.slice(2);

try {
  await runProgram(args, context);
} catch (error) {
  process.stderr.write(
    renderError(error, { json: args.includes("--json"), verbose: args.includes("--verbose") }),
  );
  process.exitCode = exitCodeOf(error);
}
