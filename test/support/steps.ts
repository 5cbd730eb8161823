import { fileURLToPath } from "node:url";
import type { StepName } from "../../src/flow/index.js";

/** What happens at a step of the built command line. */
export interface AtStep {
  /**
   * SIGKILL of this process (default), of the guard, of the guard and at once of this process, or of `pid`; SIGSTOP of
   * this process, or of `pid`.
   */
  readonly action?: "kill" | "kill-guard" | "kill-both" | "kill-pid" | "stop" | "stop-pid";
  /** The process that it happens in; default the agent. */
  readonly role?: "agent" | "guard";
  /** Which time that one comes by the step; default the first. */
  readonly nth?: number;
  readonly pid?: number;
  /** A file that is made when it happens. */
  readonly mark?: string;
}

const HOOK = fileURLToPath(new URL("./step-hook.mjs", import.meta.url));

/**
 * The environment that makes something happen at steps. Nobody may ever come by a step: a test has to look at what
 * happened there.
 */
export function atSteps(steps: readonly (AtStep & { readonly name: StepName })[]): Record<string, string> {
  const wanted = steps.map((step) => ({ action: "kill", role: "agent", nth: 1, ...step }));
  return { NODE_OPTIONS: `--import=${HOOK}`, TIDEMARK_TEST_STEPS: JSON.stringify(wanted) };
}

/** As `atSteps`, of one step. */
export function atStep(name: StepName, options: AtStep = {}): Record<string, string> {
  return atSteps([{ name, ...options }]);
}
