/*
 * Loaded into a backup by NODE_OPTIONS=--import: suspends it (SIGSTOP, as a suspended host would) at a step of its commit,
 * which STOP_AT names. Everything else of it is what users run.
 *
 *   image    its last image takes its name: before the first look at the lock
 *   before   right before the manifest takes its name: after the first look
 *   after    the manifest is there: before the second look
 */
import fs from "node:fs/promises";
import { writeSync } from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import { isMainThread } from "node:worker_threads";

const { link, rename } = fs;
const at = process.env["STOP_AT"];

function stop(step) {
  if (step !== at || !isMainThread) return;
  writeSync(1, `{"event":"stopping"}\n`);
  process.kill(process.pid, "SIGSTOP");
}

fs.rename = async (from, to) => {
  await rename(from, to);
  if (String(to).endsWith(".qcow2")) stop("image");
};
fs.link = async (from, to) => {
  const isManifest = String(to).endsWith("/point.json");
  if (isManifest) stop("before");
  await link(from, to);
  if (isManifest) stop("after");
};
syncBuiltinESMExports();
