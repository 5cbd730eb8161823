import { Worker } from "node:worker_threads";

/**
 * Starts a worker thread from a module beside this one, compiled or as TypeScript source.
 * From sources (tests, tsx) the thread registers tsx itself: Node 20 ignores `--import` for worker entries.
 *
 * @param script the compiled name: `new URL("./x.worker.js", import.meta.url)`
 * @param workerData handed to the worker
 */
export function startWorker(script: URL, workerData: unknown): Worker {
  if (!import.meta.url.endsWith(".ts")) return new Worker(script, { workerData });
  const source = JSON.stringify(script.href.replace(/\.js$/, ".ts"));
  const bootstrap = `import("tsx/esm/api").then((tsx) => { tsx.register(); return import(${source}); });`;
  return new Worker(bootstrap, { eval: true, execArgv: [], workerData });
}
