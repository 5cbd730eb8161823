import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { closeSync, constants, openSync, writeSync } from "node:fs";
import { readdir, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Worker } from "node:worker_threads";
import { describe, expect, it, vi } from "vitest";
import { backup } from "../../src/backup/index.js";
import { deferred } from "../../src/flow/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import { initRepository } from "../../src/repository/index.js";
import { MemoryStorage } from "../../src/storage/index.js";
import { NOTHING, residueOf } from "../interop/machine-fixture.js";
import { writeNoise } from "../support/image.js";
import { startMachine } from "../support/qemu.js";
import { Rig } from "../support/rig.js";
import { temporaryDirectory } from "../support/temporary.js";

const MiB = 1024 * 1024;
const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

/** A storage whose images stop taking bytes, as a network share does whose server went away. */
class StalledStorage extends MemoryStorage {
  /** Resolves when the first write hangs. */
  readonly stalled = deferred<undefined>();
  readonly #recovered = deferred<undefined>();

  /** Lets what hangs go on. */
  recover(): void {
    this.#recovered.resolve(undefined);
  }

  override async create(...args: Parameters<MemoryStorage["create"]>): ReturnType<MemoryStorage["create"]> {
    const sink = await super.create(...args);
    return {
      append: async (bytes) => {
        this.stalled.resolve(undefined);
        await this.#recovered.promise;
        await sink.append(bytes);
      },
      commit: (head) => sink.commit(head),
      abort: () => sink.abort(),
    };
  }
}

describe("backup()", () => {
  it("frees the guest when it is interrupted, although the repository takes no bytes any more", async () => {
    await using directory = await temporaryDirectory();
    const path = await writeNoise(directory.file("disk.raw"), 16 * MiB, 1);
    await using vm = await startMachine({ disks: [{ path, format: "raw" }] });
    const storage = new StalledStorage();
    const interruption = new AbortController();
    const running = backup({
      repository: await initRepository(storage),
      machine: "vm",
      source: { kind: "live", address: parseQmpAddress(vm.qmp), runDirectory: directory.file("run") },
      tidemarkVersion: "0.0.0",
      signal: interruption.signal,
    });
    running.catch(() => undefined);
    await storage.stalled.promise;
    expect((await residueOf(vm.monitor)).jobs).toHaveLength(1);

    const reason = new Error("interrupted");
    interruption.abort(reason);
    await vi.waitFor(
      async () => {
        const { nodes, jobs, exports } = await residueOf(vm.monitor);
        expect({ nodes, jobs, exports }).toEqual({ nodes: [], jobs: [], exports: [] });
      },
      { timeout: 10_000, interval: 100 },
    );

    storage.recover();
    await expect(running).rejects.toBe(reason);
    expect({ ...(await residueOf(vm.monitor)), checkpoints: [] }).toEqual(NOTHING);
  });
});

describe("backup() with a worker thread that dies", () => {
  it("says so, and takes down all the same", async () => {
    await using directory = await temporaryDirectory();
    const path = await writeNoise(directory.file("disk.raw"), 16 * MiB, 1);
    await using vm = await startMachine({ disks: [{ path, format: "raw" }] });
    const workers: Worker[] = [];
    const remember = (worker: Worker): number => workers.push(worker);
    process.on("worker", remember);
    const warnings: string[] = [];
    const running = backup({
      repository: await initRepository(new MemoryStorage()),
      machine: "vm",
      source: { kind: "live", address: parseQmpAddress(vm.qmp), runDirectory: directory.file("run") },
      tidemarkVersion: "0.0.0",
      workers: 2,
      bandwidth: 4 * MiB,
      observer: {
        progress: () => void workers[0]?.terminate(),
        warning: (text) => warnings.push(text),
      },
    });
    await expect(running).rejects.toMatchObject({ code: "TM_WORKER" });
    process.off("worker", remember);
    expect(warnings).toEqual([]);
    expect({ ...(await residueOf(vm.monitor)), checkpoints: [] }).toEqual(NOTHING);
  });
});

/** Starts a slow backup and closes one of its outputs once something came through it. */
async function startDeaf(rig: Rig, closed: "stdout" | "stderr"): Promise<ChildProcess> {
  const args = rig.backupArguments(["--bandwidth", "2MiB/s"]);
  if (closed === "stderr") args.splice(args.indexOf("--json"), 1);
  const child = spawn(process.execPath, [MAIN, ...args], {
    stdio: ["ignore", "pipe", "pipe"],
    timeout: 60_000,
    env: { ...process.env, TIDEMARK_RUNTIME_DIR: rig.directory.file("run") },
  });
  await once(child[closed], "data");
  child[closed].destroy();
  return child;
}

async function startRig(): Promise<Rig> {
  const rig = await Rig.create();
  const path = await writeNoise(rig.directory.file("disk.raw"), 16 * MiB, 1);
  await rig.start([{ path, format: "raw" }]);
  return rig;
}

describe("tidemark backup", () => {
  it("tears down in order and says why when nobody reads its output any more", async () => {
    await using rig = await startRig();
    const child = await startDeaf(rig, "stdout");
    const said: string[] = [];
    child.stderr?.setEncoding("utf8").on("data", (text: string) => said.push(text));
    expect(await once(child, "close")).toEqual([1, null]);
    expect(await residueOf(rig.machine.monitor)).toMatchObject({ nodes: [], jobs: [], exports: [] });
    expect(said.join("")).toContain("Cannot write to standard output");
  });

  it("is interrupted in order although nobody reads its messages any more", async () => {
    await using rig = await startRig();
    const child = await startDeaf(rig, "stderr");
    child.kill("SIGTERM");
    expect(await once(child, "close")).toEqual([130, null]);
    expect(await residueOf(rig.machine.monitor)).toMatchObject({ nodes: [], jobs: [], exports: [] });
  });
});

/** Bytes of all files below a directory. */
async function sizeOf(directory: string): Promise<number> {
  const entries = await readdir(directory, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile());
  const sizes = files.map(async ({ parentPath, name }) => (await stat(join(parentPath, name))).size);
  return (await Promise.all(sizes)).reduce((sum, size) => sum + size, 0);
}

/** Writes to a process's terminal until it takes no more. */
function fillTerminal(pid: number): void {
  const { O_WRONLY, O_NONBLOCK, O_NOCTTY } = constants;
  const terminal = openSync(`/proc/${pid}/fd/2`, O_WRONLY | O_NONBLOCK | O_NOCTTY);
  const fill = (): void => {
    for (;;) writeSync(terminal, "x".repeat(64));
  };
  expect(fill).toThrow("EAGAIN");
  closeSync(terminal);
}

describe("tidemark backup on a terminal", () => {
  it("goes on, and can be interrupted, when the terminal takes nothing more", async () => {
    await using rig = await Rig.create();
    const path = await writeNoise(rig.directory.file("disk.raw"), 64 * MiB, 1);
    const { monitor } = await rig.start([{ path, format: "raw" }]);
    const args = rig.backupArguments(["--bandwidth", "4MiB/s"]).filter((argument) => argument !== "--json");
    const command = ["exec", process.execPath, MAIN, ...args].join(" ");
    const terminal = spawn("script", ["--quiet", "--command", command, "/dev/null"], {
      stdio: ["ignore", "pipe", "ignore"],
      timeout: 60_000,
      env: { ...process.env, TERM: "xterm", TIDEMARK_RUNTIME_DIR: rig.directory.file("run") },
    });
    const ended = once(terminal, "close");
    terminal.stdout.resume();
    await vi.waitFor(async () => expect(await sizeOf(rig.repository)).toBeGreaterThan(4 * MiB), 20_000);
    const runs = rig.directory.file("run/tidemark");
    const [record = ""] = await readdir(runs);
    const { holder } = JSON.parse(await readFile(join(runs, record), "utf8")) as { holder: { pid: number } };
    // Whoever reads the terminal stops doing so.
    terminal.kill("SIGSTOP");
    fillTerminal(holder.pid);

    const before = await sizeOf(rig.repository);
    await vi.waitFor(
      async () => expect(await sizeOf(rig.repository)).toBeGreaterThan(before + 8 * MiB),
      20_000,
    );
    process.kill(holder.pid, "SIGTERM");
    await vi.waitFor(
      async () => expect(await residueOf(monitor)).toMatchObject({ nodes: [], jobs: [], exports: [] }),
      20_000,
    );
    terminal.kill("SIGCONT");
    await ended;
  });
});

describe("tidemark restore --to -", () => {
  it("ends at once when nobody reads its output any more, in data as in zeroes", async () => {
    await using rig = await Rig.create();
    const noise = await writeNoise(rig.directory.file("noise.raw"), 16 * MiB, 1);
    const empty = await rig.image("empty.raw", "raw", 1024 * 1024 * MiB);
    await rig.start([noise, empty].map((path) => ({ path, format: "raw" })));
    await rig.backup();
    for (const disk of ["vd0", "vd1"]) {
      const args = ["restore", "vm", "--repo", rig.repository, "--disk", disk, "--to", "-"];
      const child = spawn(process.execPath, [MAIN, ...args], {
        stdio: ["ignore", "pipe", "pipe"],
        timeout: 20_000,
        killSignal: "SIGKILL",
      });
      child.stderr.resume();
      await once(child.stdout, "data");
      child.stdout.destroy();
      expect({ disk, end: await once(child, "close") }).toEqual({ disk, end: [1, null] });
    }
  });
});
