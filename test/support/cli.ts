import { spawn, type ChildProcessByStdio } from "node:child_process";
import { fileURLToPath } from "node:url";
import type { Readable, Writable } from "node:stream";
import { deferred, withDeadline, type Deferred } from "../../src/flow/index.js";
import { isRecord, parseLine } from "./json-lines.js";
import { spawnError } from "./tools.js";

/** One line of `--json` output. */
export type CliEvent = Readonly<Record<string, unknown>>;

export interface CliOptions {
  readonly cwd?: string;
  /** Added to the environment; `undefined` removes. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Written to standard input, which is closed behind it. */
  readonly input?: string;
  /** Milliseconds until it is killed; default 60,000. */
  readonly deadline?: number;
}

/** A run of the command line that ended. */
export interface CliResult {
  /** Exit code; null when a signal ended it. */
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  /** Standard output as it came, for restores to `-`. */
  readonly stdoutBytes: Buffer;
  readonly stderr: string;
  /** The one JSON document on standard output, or on standard error when that failed. @throws when there is none */
  json(): unknown;
  /** The JSON objects on standard output, one a line. @throws when a line is none */
  events(): CliEvent[];
}

interface Waiter extends Deferred<CliEvent> {
  readonly matches: (event: CliEvent) => boolean;
}

const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

/** Runs `tidemark <args>` as it is built, to its end. Any exit code is an answer: the test says which it expects. */
export async function runTidemark(args: readonly string[], options: CliOptions = {}): Promise<CliResult> {
  return startTidemark(args, options).ended;
}

/** Runs `tidemark <args>`, which must succeed. @throws with all that it printed when its code is not 0 */
export async function tidemark(args: readonly string[], options: CliOptions = {}): Promise<CliResult> {
  const result = await runTidemark(args, options);
  if (result.code === 0) return result;
  const end = result.signal ?? `code ${result.code ?? "unknown"}`;
  throw new Error(`\`tidemark ${args.join(" ")}\` ended with ${end}\n${result.stdout}${result.stderr}`);
}

/** Starts `tidemark <args>`: for tests that interrupt or kill it. */
export function startTidemark(args: readonly string[], options: CliOptions = {}): RunningTidemark {
  const child = spawn(process.execPath, [MAIN, ...args], {
    stdio: ["pipe", "pipe", "pipe"],
    timeout: options.deadline ?? 60_000,
    killSignal: "SIGKILL",
    env: { ...process.env, NO_COLOR: "1", FORCE_COLOR: undefined, ...options.env },
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  });
  child.stdin.on("error", () => undefined);
  child.stdin.end(options.input);
  return new RunningTidemark(child, args.includes("--json"));
}

/** A `tidemark` under way. `await using` kills it. */
export class RunningTidemark implements AsyncDisposable {
  readonly ended: Promise<CliResult>;
  readonly #child: ChildProcessByStdio<Writable, Readable, Readable>;
  readonly #isJson: boolean;
  readonly #stdout: Buffer[] = [];
  readonly #waiters = new Set<Waiter>();
  #stderr = "";
  #unfinishedLine = "";

  /** Use `startTidemark`. */
  constructor(child: ChildProcessByStdio<Writable, Readable, Readable>, isJson: boolean) {
    this.#child = child;
    this.#isJson = isJson;
    child.stdout.on("data", (chunk: Buffer) => this.#onOutput(chunk));
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr += text;
    });
    this.ended = new Promise((resolve, reject) => {
      child.once("error", (error) => reject(spawnError("node", error)));
      child.once("close", (code, signal) => {
        const end = new Error(`tidemark ended (${signal ?? code ?? ""}) before that event\n${this.#stderr}`);
        for (const waiter of this.#waiters) waiter.reject(end);
        resolve(this.#result(code, signal));
      });
    });
    // Whoever awaits it gets the rejection; a test that only kills does not have to.
    this.ended.catch(() => undefined);
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error("tidemark was not started");
    return this.#child.pid;
  }

  /** Sends a signal; await `ended` for what becomes of it. */
  kill(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  /** Waits for a line of `--json` output from now on. @throws when it ends first, or after 30 s */
  async nextEvent(matches: (event: CliEvent) => boolean): Promise<CliEvent> {
    const waiter: Waiter = { ...deferred<CliEvent>(), matches };
    this.#waiters.add(waiter);
    try {
      return await withDeadline(waiter.promise, 30_000, "Wait for an event of tidemark");
    } finally {
      this.#waiters.delete(waiter);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.ended.catch(() => undefined);
  }

  #onOutput(chunk: Buffer): void {
    this.#stdout.push(chunk);
    if (!this.#isJson) return;
    const lines = (this.#unfinishedLine + chunk.toString("latin1")).split("\n");
    this.#unfinishedLine = lines.pop() ?? "";
    for (const line of lines) {
      const event = parseLine(line);
      if (event === undefined) continue;
      for (const waiter of this.#waiters) if (waiter.matches(event)) waiter.resolve(event);
    }
  }

  #result(code: number | null, signal: NodeJS.Signals | null): CliResult {
    const stdoutBytes = Buffer.concat(this.#stdout);
    const stdout = stdoutBytes.toString("utf8");
    const stderr = this.#stderr;
    return {
      ...{ code, signal, stdout, stdoutBytes, stderr },
      json: () => JSON.parse(stdout.trim() === "" ? stderr : stdout) as unknown,
      events: () =>
        stdout
          .split("\n")
          .filter((line) => line.trim() !== "")
          .map(parseEvent),
    };
  }
}

function parseEvent(line: string): CliEvent {
  const value: unknown = JSON.parse(line);
  if (!isRecord(value)) throw new Error(`Not an event of tidemark: ${line}`);
  return value;
}
