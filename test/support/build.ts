import { fileURLToPath } from "node:url";
import { run } from "./tools.js";

/** Before any test that runs the command line: builds what users run, if the sources have changed. */
export async function setup(): Promise<void> {
  const script = fileURLToPath(new URL("../../scripts/setup.sh", import.meta.url));
  await run("sh", [script, "--build"], { deadline: 300_000 });
}
