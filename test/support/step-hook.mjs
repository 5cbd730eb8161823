// Something happens at named steps of the built command line: NODE_OPTIONS=--import=<this file>, and in the environment
// TIDEMARK_TEST_STEPS, a JSON array of what steps.ts describes.
//
// The command line's own step() does nothing; this file takes the place of its module.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { register } from "node:module";
import { isMainThread } from "node:worker_threads";

const { env } = process;
const role = process.argv[1]?.endsWith("/guard/entry.js") ? "guard" : "agent";
const wanted = JSON.parse(env["TIDEMARK_TEST_STEPS"] ?? "[]").filter((one) => one.role === role);
const seen = new Map();

if (isMainThread && wanted.length > 0) register(import.meta.url);

/** For `register`: what Node loads. */
export async function load(url, context, nextLoad) {
  if (!url.endsWith("/dist/flow/step.js")) return nextLoad(url, context);
  const source = `export { step } from ${JSON.stringify(import.meta.url)};`;
  return { format: "module", source, shortCircuit: true };
}

/** In place of the command line's. */
export async function step(name) {
  const nth = (seen.get(name) ?? 0) + 1;
  seen.set(name, nth);
  for (const one of wanted) if (one.name === name && one.nth === nth) act(one);
}

function act({ action, pid, mark }) {
  if (mark !== undefined) writeFileSync(mark, "");
  if (action === "kill-guard" || action === "kill-both") process.kill(guardOfThisRun(), "SIGKILL");
  if (action === "kill-pid") process.kill(pid, "SIGKILL");
  if (action === "stop-pid") process.kill(pid, "SIGSTOP");
  if (action === "kill" || action === "kill-both") process.kill(process.pid, "SIGKILL");
  if (action === "stop") process.kill(process.pid, "SIGSTOP");
}

/** By the run's state file. */
function guardOfThisRun() {
  const directory = `${env["TIDEMARK_RUNTIME_DIR"]}/tidemark`;
  const records = readdirSync(directory)
    .filter((name) => name.endsWith(".json"))
    .map((name) => JSON.parse(readFileSync(`${directory}/${name}`, "utf8")));
  const own = records.find(({ holder }) => holder.pid === process.pid);
  if (own?.guard === undefined) throw new Error("This run has no guard on record");
  return own.guard.pid;
}
