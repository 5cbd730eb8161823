// Something happens at a named step of a built command line: NODE_OPTIONS=--import=<this file>, and in the environment
//
//     TIDEMARK_TEST_STEP     the step, "frozen"; the second time that one comes by it, "frozen#2"
//     TIDEMARK_TEST_ACTION   "kill" (default): SIGKILL of this process · "kill-guard" · "kill-both": of the guard, then of
//                            this process · "kill-pid": of process TIDEMARK_TEST_PID · "stop": SIGSTOP of this process
//     TIDEMARK_TEST_ROLE     "agent" (default), or "guard": the process that it happens in
//     TIDEMARK_TEST_MARK     a file that is made when it has happened
//
// The command line's own step() does nothing; this file takes the place of its module.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { register } from "node:module";
import { isMainThread } from "node:worker_threads";

const { env } = process;
const role = process.argv[1]?.endsWith("/guard/entry.js") ? "guard" : "agent";
const [wanted, nth = "1"] = (env["TIDEMARK_TEST_STEP"] ?? "").split("#");
let seen = 0;

if (isMainThread && role === (env["TIDEMARK_TEST_ROLE"] ?? "agent")) register(import.meta.url);

/** For `register`: what Node loads. */
export async function load(url, context, nextLoad) {
  if (!url.endsWith("/dist/flow/step.js")) return nextLoad(url, context);
  const source = `export { step } from ${JSON.stringify(import.meta.url)};`;
  return { format: "module", source, shortCircuit: true };
}

/** In place of the command line's. */
export async function step(name) {
  if (name !== wanted) return;
  seen += 1;
  if (seen === Number(nth)) await act();
}

async function act() {
  const action = env["TIDEMARK_TEST_ACTION"] ?? "kill";
  if (env["TIDEMARK_TEST_MARK"] !== undefined) writeFileSync(env["TIDEMARK_TEST_MARK"], "");
  if (action === "kill-guard" || action === "kill-both") process.kill(guardOfThisRun(), "SIGKILL");
  if (action === "kill-pid") process.kill(Number(env["TIDEMARK_TEST_PID"]), "SIGKILL");
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
