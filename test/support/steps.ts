import { fileURLToPath } from "node:url";
import type { StepName } from "../../src/flow/index.js";

/** What happens at a step of the built command line; see step-hook.mjs. */
export interface AtStep {
  readonly action?: "kill" | "kill-guard" | "kill-both" | "kill-pid" | "stop";
  /** The process that it happens in; default the agent. */
  readonly role?: "agent" | "guard";
  /** Which time that one comes by the step; default the first. */
  readonly nth?: number;
  /** For "kill-pid". */
  readonly pid?: number;
  /** A file that is made when it has happened. */
  readonly mark?: string;
}

const HOOK = new URL("./step-hook.mjs", import.meta.url);

/** The environment that makes something happen at a step. A step that is never come by fails a test: look at what it leaves. */
export function atStep(name: StepName, options: AtStep = {}): Record<string, string> {
  const { action = "kill", role = "agent", nth = 1, pid, mark } = options;
  return {
    NODE_OPTIONS: `--import=${fileURLToPath(HOOK)}`,
    TIDEMARK_TEST_STEP: `${name}#${nth}`,
    TIDEMARK_TEST_ACTION: action,
    TIDEMARK_TEST_ROLE: role,
    ...(pid === undefined ? {} : { TIDEMARK_TEST_PID: String(pid) }),
    ...(mark === undefined ? {} : { TIDEMARK_TEST_MARK: mark }),
  };
}
