import { chmod, cp, mkdir, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run, type ToolResult } from "../support/tools.js";

const SCRIPT = fileURLToPath(new URL("../../scripts/setup.sh", import.meta.url));

/** A package with one dependency, a folder of its own, whose build writes what the real one does. */
async function smallPackage(directory: TemporaryDirectory): Promise<void> {
  const root = { name: "small", version: "1.0.0", dependencies: { part: "file:part" } };
  const manifest = { ...root, scripts: { build: "mkdir -p dist/cli && cp src/main.ts dist/cli/main.js" } };
  const part = { name: "part", version: "1.0.0" };
  const lock = {
    ...{ name: "small", version: "1.0.0", lockfileVersion: 3 },
    packages: { "": root, part, "node_modules/part": { resolved: "part", link: true } },
  };
  await mkdir(directory.file("part"));
  await writeFile(directory.file("part/package.json"), JSON.stringify(part));
  await mkdir(directory.file("scripts"));
  await mkdir(directory.file("src"));
  await cp(SCRIPT, directory.file("scripts/setup.sh"));
  await writeFile(directory.file("package.json"), JSON.stringify(manifest));
  await writeFile(directory.file("package-lock.json"), JSON.stringify(lock));
  await writeFile(directory.file("tsconfig.json"), "{}");
  await writeFile(directory.file("tsconfig.build.json"), "{}");
  await writeFile(directory.file("src/main.ts"), "1");
}

function setup(
  directory: TemporaryDirectory,
  args: readonly string[] = [],
  path?: string,
): Promise<ToolResult> {
  return run("/bin/sh", ["scripts/setup.sh", ...args], {
    cwd: directory.path,
    codes: [0, 1],
    ...(path === undefined ? {} : { env: { PATH: path } }),
  });
}

/** A PATH with links to programs of this machine, and scripts in place of others. */
async function pathWith(
  directory: TemporaryDirectory,
  programs: readonly string[],
  scripts: Readonly<Record<string, string>>,
): Promise<string> {
  const bin = directory.file("bin");
  await mkdir(bin);
  for (const program of programs) {
    const { stdout } = await run("sh", ["-c", `command -v ${program}`]);
    await symlink(stdout.trim(), `${bin}/${program}`);
  }
  for (const [name, body] of Object.entries(scripts)) {
    await writeFile(`${bin}/${name}`, `#!/bin/sh\n${body}\n`);
    await chmod(`${bin}/${name}`, 0o755);
  }
  return bin;
}

const SHELL = ["dirname", "cat", "rm", "mktemp", "sha256sum"];
const QEMU = [
  "qemu-system-x86_64",
  "qemu-img",
  "qemu-io",
  "qemu-nbd",
  "qemu-storage-daemon",
  "mkfs.ext4",
  "filefrag",
  "mkfs.xfs",
  "mkfs.btrfs",
  "make",
  "python3",
];

describe("scripts/setup.sh", () => {
  it("installs by the lock file and builds by the sources, and is silent when nothing has changed", async () => {
    await using directory = await temporaryDirectory();
    await smallPackage(directory);
    expect(await setup(directory)).toMatchObject({
      code: 0,
      stderr: expect.stringContaining("npm packages") as string,
    });
    expect(await setup(directory)).toEqual({ code: 0, stdout: "", stderr: "" });

    const built = async (): Promise<string> => readFile(directory.file("dist/cli/main.js"), "utf8");
    expect(await setup(directory, ["--build"])).toMatchObject({ stderr: "setup: building dist\n" });
    expect(await built()).toBe("1");
    expect(await setup(directory, ["--build"])).toEqual({ code: 0, stdout: "", stderr: "" });
    await writeFile(directory.file("src/main.ts"), "2");
    await setup(directory, ["--build"]);
    expect(await built()).toBe("2");
    await rm(directory.file("dist"), { recursive: true });
    await setup(directory, ["--build"]);
    expect(await built()).toBe("2");

    await writeFile(
      directory.file("package-lock.json"),
      `${await readFile(directory.file("package-lock.json"), "utf8")}\n`,
    );
    expect(await setup(directory)).toMatchObject({
      stderr: expect.stringContaining("npm packages") as string,
    });
    expect(await setup(directory)).toEqual({ code: 0, stdout: "", stderr: "" });
  });

  it("shows why npm ci failed, and leaves no stamp", async () => {
    await using directory = await temporaryDirectory();
    await smallPackage(directory);
    await writeFile(directory.file("package-lock.json"), "not JSON");
    const { code, stderr } = await setup(directory);
    expect([code, stderr]).toEqual([1, expect.stringContaining("setup: npm ci failed")]);
    expect(stderr).toContain("npm error");
    await expect(stat(directory.file("node_modules/.setup-stamp"))).rejects.toThrow("ENOENT");
  });

  it("installs missing Debian packages as root, and does not believe apt-get's exit code alone", async () => {
    await using directory = await temporaryDirectory();
    await smallPackage(directory);
    const log = directory.file("log");
    const path = await pathWith(directory, [...SHELL, ...QEMU, "node", "npm"], {
      id: "echo 0",
      "apt-get": `echo "$*" >> ${log}`,
    });
    const { code, stderr } = await setup(directory, [], path);
    expect((await readFile(log, "utf8")).trim().split("\n")).toEqual([
      expect.stringMatching(/Timeout=\d+ -qq update$/),
      expect.stringMatching(/install -y --no-install-recommends libnbd-bin nbdkit openssl g\+\+$/),
    ]);
    expect([code, stderr]).toEqual([1, expect.stringContaining("still missing")]);
  });

  it("tells who is not root what to install, and installs nothing", async () => {
    await using directory = await temporaryDirectory();
    await smallPackage(directory);
    const log = directory.file("log");
    const path = await pathWith(directory, [...SHELL, ...QEMU, "node", "npm"], {
      id: "echo 1000",
      "apt-get": `echo "$*" >> ${log}`,
    });
    const { code, stderr } = await setup(directory, [], path);
    expect(code).toBe(1);
    expect(stderr).toContain("apt-get install --no-install-recommends libnbd-bin nbdkit openssl g++\n");
    await expect(stat(log)).rejects.toThrow("ENOENT");
  });

  it.each([
    ["v18.20.4", 1],
    ["v20.9.0", 1],
    ["v20.19.0", 0],
    ["v22.1.0", 0],
  ])("with Node %s ends with %i", async (version, expected) => {
    await using directory = await temporaryDirectory();
    await smallPackage(directory);
    await setup(directory);
    const bin = await pathWith(directory, [], { node: `echo ${version}` });
    const { code, stderr } = await setup(directory, [], `${bin}:${process.env["PATH"] ?? ""}`);
    expect([code, stderr]).toEqual([
      expected,
      expected === 0 ? "" : expect.stringContaining(`Node ${version}`),
    ]);
  });
});
