import { spawn, type ChildProcessByStdio } from "node:child_process";
import { once } from "node:events";
import { readdir, readFile } from "node:fs/promises";
import { createInterface, type Interface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { initRepository, LockedError, type Repository } from "../../src/repository/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { pointId } from "../interop/repository-points.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";

const RUN = fileURLToPath(new URL("./repository-run.ts", import.meta.url));

/** A run in a process of its own. */
class Run {
  readonly #child: ChildProcessByStdio<Writable, Readable, null>;
  readonly #lines: Interface;
  readonly #said: string[] = [];

  /** @param around a program that runs it, and its arguments */
  constructor(task: "lock" | "write", around: readonly string[] = []) {
    const program = around[0] ?? process.execPath;
    const args = around.length === 0 ? [] : [...around.slice(1), process.execPath];
    this.#child = spawn(program, [...args, "--import", "tsx", RUN, directory.path, task], {
      stdio: ["pipe", "pipe", "inherit"],
    });
    this.#lines = createInterface(this.#child.stdout);
    this.#lines.on("line", (line) => this.#said.push(line));
    this.#child.stdin.on("error", () => undefined);
    runs.push(this);
  }

  /** The next line that it says. */
  async next(): Promise<string> {
    if (this.#said.length === 0) await once(this.#lines, "line");
    return this.#said.shift()!;
  }

  go(): void {
    this.#child.stdin.write("\n");
  }

  async end(): Promise<void> {
    this.#child.stdin.end();
    if (this.#child.exitCode === null && this.#child.signalCode === null) await once(this.#child, "exit");
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  async kill(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const exited = once(this.#child, "exit");
    this.#child.kill("SIGKILL");
    await exited;
  }
}

let directory: TemporaryDirectory;
let repository: Repository;
const runs: Run[] = [];

beforeEach(async () => {
  directory = await temporaryDirectory("tm-killed-");
  repository = await initRepository(await LocalStorage.open(directory.path));
});
afterEach(async () => {
  for (const run of runs.splice(0)) await run.kill();
  await directory[Symbol.asyncDispose]();
});

describe("a machine's lock between processes", () => {
  it("is held by one of four that want it at the same moment, and free once that one is done", async () => {
    const racers = Array.from({ length: 4 }, () => new Run("lock"));
    for (const racer of racers) expect(await racer.next()).toBe("ready");
    for (const racer of racers) racer.go();
    const said = await Promise.all(racers.map((racer) => racer.next()));
    expect([...said].sort()).toEqual(["held", "refused TM_LOCKED", "refused TM_LOCKED", "refused TM_LOCKED"]);
    await expect(repository.lockMachine("web")).rejects.toThrow(LockedError);
    await racers[said.indexOf("held")]!.end();
    await (await repository.lockMachine("web")).release();
  });

  it("is taken over at once from a holder that was killed, by one of three", async () => {
    const holder = new Run("lock");
    expect(await holder.next()).toBe("ready");
    holder.go();
    expect(await holder.next()).toBe("held");
    await holder.kill();
    const racers = Array.from({ length: 3 }, () => new Run("lock"));
    for (const racer of racers) expect(await racer.next()).toBe("ready");
    for (const racer of racers) racer.go();
    const said = await Promise.all(racers.map((racer) => racer.next()));
    expect([...said].sort()).toEqual(["held", "refused TM_LOCKED", "refused TM_LOCKED"]);
    expect(await readdir(`${directory.path}/web`)).toEqual(["lock"]);
  });

  it("is not taken over from a holder that is only suspended", async () => {
    const holder = new Run("lock");
    expect(await holder.next()).toBe("ready");
    holder.go();
    expect(await holder.next()).toBe("held");
    holder.signal("SIGSTOP");
    await expect(repository.lockMachine("web")).rejects.toThrow(LockedError);
    holder.signal("SIGCONT");
    await holder.end();
    expect(await holder.next()).toBe("released");
  });
});

describe("a machine's lock between pid namespaces", () => {
  /** Containers share a host, its ids and a repository, but not their pids. */
  const CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];

  it("is not taken over because of what its holder's pid means elsewhere, only after long silence", async () => {
    const holder = new Run("lock", CONTAINER);
    expect(await holder.next()).toBe("ready");
    holder.go();
    expect(await holder.next()).toBe("held");
    const { pid } = JSON.parse(await readFile(`${directory.path}/web/lock`, "utf8")) as { pid: number };
    expect(pid).toBeLessThan(10);
    await expect(repository.lockMachine("web")).rejects.toThrow(LockedError);
    const other = new Run("lock", CONTAINER);
    expect(await other.next()).toBe("ready");
    other.go();
    expect(await other.next()).toBe("refused TM_LOCKED");

    await holder.kill();
    // Nobody can know that it is gone, but that it is silent.
    await expect(repository.lockMachine("web")).rejects.toThrow(LockedError);
    const times = { heartbeat: 10_000, stale: 1, watch: 200 };
    await (await repository.lockMachine("web", { times })).release();
  });
});

describe("a run killed before its point was committed", () => {
  it("leaves no point, and the next run removes what it wrote", async () => {
    const run = new Run("write");
    expect(await run.next()).toBe("written");
    await run.kill();
    const folder = `${directory.path}/web/${pointId(7)}`;
    const left = await readdir(folder);
    expect(left.filter((name) => name.endsWith(".partial"))).toHaveLength(1);
    expect(left).toContain("sda.qcow2");
    expect(await repository.points("web")).toEqual([]);

    await using lock = await repository.lockMachine("web");
    const { removed, kept } = await repository.collectGarbage("web", lock);
    expect({ removed, kept }).toEqual({ removed: [pointId(7)], kept: [] });
    expect(await readdir(`${directory.path}/web`)).toEqual(["lock"]);
  });
});
