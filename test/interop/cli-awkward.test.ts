import { spawn } from "node:child_process";
import { once } from "node:events";
import { open, readdir } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { compareImages, createImage, writeNoise } from "../support/image.js";
import { runTidemark, startTidemark, tidemark } from "../support/cli.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const MiB = 1024 * 1024;
const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

let directory: TemporaryDirectory;
let repository: string;
let image: string;

const environment = (): Record<string, string> => ({ TIDEMARK_RUNTIME_DIR: directory.file("run") });

/** Backs the image of a machine that is off up. */
async function backUp(name: string): Promise<void> {
  const args = ["backup", "--repo", repository, "--machine", name, "--image", `vda=${image}`, "--quiet"];
  await tidemark(args, { env: environment() });
}

beforeAll(async () => {
  directory = await temporaryDirectory();
  repository = directory.file("repository");
  image = await createImage(directory.file("vda.qcow2"), "qcow2", 64 * MiB);
  const noise = await writeNoise(directory.file("noise"), 48 * MiB, 1);
  await run("qemu-io", ["-f", "qcow2", "-c", `write -s ${noise} 0 48M`, image]);
  await tidemark(["init", "--repo", repository]);
  await backUp("vm");
}, 60_000);

afterAll(async () => {
  await directory[Symbol.asyncDispose]();
});

describe("tidemark in a place where nothing can be made", () => {
  it.each([
    ["init", ["--repo", "/proc/nowhere"]],
    ["restore", ["vm", "--to-dir", "/proc/nowhere/deeper"]],
  ])("%s: an error, and no endless attempt", async (command, args) => {
    const env = { TIDEMARK_REPO: repository };
    const { code, signal, stderr } = await runTidemark([command, ...args], { env, deadline: 20_000 });
    expect({ code, signal }).toEqual({ code: command === "init" ? 1 : 2, signal: null });
    expect(stderr).toContain("/proc/nowhere");
  });
});

describe("tidemark whose report cannot be written", () => {
  it.each(["list", "show"])("%s > /dev/full: exit 1 and the reason", async (command) => {
    await using full = await open("/dev/full", "w");
    const args = [MAIN, command, "vm", "--repo", repository];
    const child = spawn(process.execPath, args, { stdio: ["ignore", full.fd, "pipe"], timeout: 20_000 });
    let said = "";
    child.stderr?.setEncoding("utf8").on("data", (text: string) => (said += text));
    expect(await once(child, "close")).toEqual([1, null]);
    expect(said).toContain("Cannot write to standard output");
  });
});

describe("a restore that is killed", () => {
  const partials = async (): Promise<string[]> =>
    (await readdir(directory.path)).filter((name) => name.endsWith(".tidemark-partial"));

  it.each(["raw", "qcow2"])(
    "%s: the next one to the same target takes away what it left, and is right",
    async (format) => {
      const target = directory.file(`restored.${format}`);
      const args = ["restore", "vm", "--repo", repository, "--to", target, "--format", format];
      await using other = startTidemark([
        ...args.slice(0, 4),
        "--to",
        directory.file("other.raw"),
        "--bandwidth",
        "1MiB/s",
        "--json",
      ]);
      await using killed = startTidemark([...args, "--bandwidth", "8MiB/s", "--json"]);
      for (const running of [other, killed]) {
        await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
      }
      killed.kill("SIGKILL");
      await killed.ended;
      expect((await partials()).filter((name) => name.startsWith(`.restored.${format}.`))).toHaveLength(1);
      await tidemark([...args, "--quiet"]);
      expect(await partials()).toEqual([expect.stringMatching(/^\.other\.raw\./)]);
      const restored = { path: target, format: format as "raw" | "qcow2" };
      expect(await compareImages(restored, { path: image, format: "qcow2" })).toBe("identical");
    },
  );

  it.each(["SIGINT", "SIGTERM"] as const)(
    "no: interrupted by %s it leaves nothing, and exits with 130",
    async (signal) => {
      const target = directory.file("interrupted.raw");
      const args = ["restore", "vm", "--repo", repository, "--to", target, "--bandwidth", "1MiB/s", "--json"];
      await using running = startTidemark(args);
      await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
      running.kill(signal);
      const result = await running.ended;
      expect(result.code).toBe(130);
      expect(result.events().at(-1)).toMatchObject({ event: "error", code: "TM_INTERRUPTED" });
      expect((await readdir(directory.path)).filter((name) => name.includes("interrupted"))).toEqual([]);
    },
  );
});
