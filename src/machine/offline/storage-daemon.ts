import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { rmSync } from "node:fs";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { messageOf, NotFoundError, TidemarkError } from "../../errors/index.js";
import { anySignal, pause, withDeadline } from "../../flow/index.js";
import { hasRoomForSocket } from "../freeze/export.js";
import { QmpClient, QmpNotFoundError, type QmpAddress } from "../../qmp/index.js";

/** The program, unless another is named. */
export const STORAGE_DAEMON = "qemu-storage-daemon";

/** How long it may take to start, and to store what it has to store at its end; milliseconds. */
const START_DEADLINE = 20_000;
const END_DEADLINE = 120_000;

/**
 * A qemu-storage-daemon of ours: QEMU's block layer without a machine. It ends when this process does, however
 * that ends, and in order: bitmaps are stored.
 */
export class StorageDaemon implements AsyncDisposable {
  readonly address: QmpAddress & { readonly transport: "unix" };
  readonly qmp: QmpClient;
  readonly #child: ChildProcess;
  /** A directory of its own, removed at its end. */
  readonly directory: string;
  readonly #stderr: () => string;

  private constructor(child: ChildProcess, directory: string, stderr: () => string, qmp: QmpClient) {
    this.#child = child;
    this.directory = directory;
    this.#stderr = stderr;
    this.qmp = qmp;
    this.address = addressIn(directory);
  }

  /**
   * Starts one, with no images yet.
   *
   * @param program its name or path
   * @param options.directory a directory to make for it, which whoever comes after a dead process can find; default one
   *   with a random name
   * @throws {NotFoundError} when it is not installed
   * @throws {TidemarkError} TM_STORAGE_DAEMON when it ends, or does not serve its monitor in time
   */
  static async start(
    program: string,
    options: IoOptions & { readonly directory?: string | undefined } = {},
  ): Promise<StorageDaemon> {
    options.signal?.throwIfAborted();
    const directory = await makeDirectory(options.directory);
    const { path } = addressIn(directory);
    // The kernel ends it in order when this process dies. Detached: Ctrl-C on a terminal is for us alone.
    const child = spawn(
      "setpriv",
      [
        ...["--pdeathsig", "TERM", program],
        ...["--chardev", `socket,id=monitor,path=${path},server=on,wait=off`],
        ...["--monitor", "chardev=monitor"],
      ],
      { stdio: ["ignore", "ignore", "pipe"], detached: true },
    );
    let stderr = "";
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      stderr = (stderr + text).slice(-4096);
    });
    const ended = endOf(child, program, () => stderr);
    // Once it serves, its end is told by the monitor's connection.
    ended.catch(() => undefined);
    const giveUp = new AbortController();
    const signal = anySignal(options.signal, giveUp.signal);
    try {
      const qmp = await Promise.race([greeted(directory, signal), ended]);
      return new StorageDaemon(child, directory, () => stderr, qmp);
    } catch (error) {
      giveUp.abort(error);
      child.kill("SIGKILL");
      await rm(directory, { recursive: true, force: true });
      throw error;
    }
  }

  /**
   * Ends it and waits until it has stored its bitmaps and let go of its images.
   *
   * @throws {TidemarkError} TM_STORAGE_DAEMON when it does not end in order
   */
  async stop(): Promise<void> {
    try {
      const exit = this.#exited();
      this.#child.kill("SIGTERM");
      const code = await withDeadline(exit, END_DEADLINE, "End the storage daemon");
      if (code === 0) return;
      throw new TidemarkError(
        "TM_STORAGE_DAEMON",
        `End the storage daemon: it ended with code ${code ?? "unknown"}: ${this.#stderr().trim()}`,
        { hint: "The next backup of these images may have to be full" },
      );
    } finally {
      await this[Symbol.asyncDispose]();
    }
  }

  /** Ends it at once if it still runs; never throws. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.qmp.close();
    const exit = this.#exited();
    this.#child.kill("SIGKILL");
    await exit;
    try {
      // By this thread: see tearDown().
      rmSync(this.directory, { recursive: true, force: true });
    } catch (error) {
      if (!(error instanceof Error && "syscall" in error)) throw error;
    }
  }

  async #exited(): Promise<number | null> {
    const { exitCode, signalCode } = this.#child;
    if (exitCode !== null || signalCode !== null) return exitCode;
    const [code] = (await once(this.#child, "exit")) as [number | null];
    return code;
  }
}

async function makeDirectory(path: string | undefined): Promise<string> {
  if (path === undefined || !hasRoomForSocket(path)) return await mkdtemp(join(tmpdir(), "tm-qsd-"));
  await mkdir(path, { mode: 0o700 });
  return path;
}

function addressIn(directory: string): QmpAddress & { readonly transport: "unix" } {
  return { transport: "unix", path: join(directory, "qmp.sock") };
}

/** Rejects when the child ends, or cannot be started. */
async function endOf(child: ChildProcess, program: string, stderr: () => string): Promise<never> {
  let code: unknown;
  try {
    [code] = (await once(child, "exit")) as [unknown];
  } catch (error) {
    const hint = "Install util-linux (setpriv)";
    throw new NotFoundError("TM_STORAGE_DAEMON", `Cannot start ${program}: ${messageOf(error)}`, {
      cause: error,
      hint,
    });
  }
  // setpriv's codes for what it cannot run.
  if (code === 127 || code === 126) {
    throw new NotFoundError("TM_STORAGE_DAEMON", `Cannot start ${program}: it is not installed`, {
      hint: "Install Debian's qemu-system-common, or name the program in TIDEMARK_QSD",
    });
  }
  throw new TidemarkError(
    "TM_STORAGE_DAEMON",
    `Cannot start ${program}: it ended with code ${String(code)}: ${stderr().trim()}`,
  );
}

/** Connects as soon as the daemon listens: it has no way to tell. */
async function greeted(directory: string, signal: AbortSignal): Promise<QmpClient> {
  const deadline = Date.now() + START_DEADLINE;
  for (;;) {
    try {
      return await QmpClient.connect(addressIn(directory), { signal });
    } catch (error) {
      if (!(error instanceof QmpNotFoundError) || Date.now() > deadline) throw error;
      await pause(10, signal);
    }
  }
}
