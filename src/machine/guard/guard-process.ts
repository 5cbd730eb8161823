import { spawn, type ChildProcess } from "node:child_process";
import { createRequire } from "node:module";
import type { Socket } from "node:net";
import { fileURLToPath, pathToFileURL } from "node:url";
import { messageOf } from "../../errors/index.js";
import { deferred, step, withDeadline } from "../../flow/index.js";
import type { ProcessIdentity } from "../../process/index.js";
import { GuardError } from "../errors.js";
import { closed, hear, say, type HoldOrder, type Order, type Report } from "./orders.js";

/**
 * The guard's descriptor of the control connection; those that it is given follow. Never one of the first three: Node
 * makes those blocking, for everybody who has a duplicate.
 */
export const CONTROL = 3;
const FIRST_GIVEN = CONTROL + 1;

/** How long a guard may take to start, to let go, and to end; milliseconds. */
const START_DEADLINE = 20_000;
const ANSWER_DEADLINE = 5000;

/** What a guard is given: descriptors of this process. */
export interface GivenDescriptors {
  readonly qmp: number | undefined;
  readonly connections: readonly number[];
  /** The guard that is to be relieved. */
  readonly previous: GuardProcess | undefined;
}

/** What a guard is told besides. */
export type HoldDetails = Omit<HoldOrder, "order" | "qmp" | "connections" | "previous">;

/** The agent's end of a guard: a process of its own session, which holds duplicates of what it was given. */
export class GuardProcess {
  /** Resolves with how it ended. */
  readonly ended: Promise<string>;
  /** Resolves when the guard finds a scratch bound passed, with what is wrong. */
  readonly full: Promise<string>;
  readonly #child: ChildProcess;
  readonly #control: Socket;
  readonly #holding = deferred<ProcessIdentity>();
  readonly #full = deferred<string>();
  readonly #letGone = deferred<undefined>();
  #stderr = "";

  private constructor(child: ChildProcess) {
    this.#child = child;
    this.#control = child.stdio[CONTROL] as Socket;
    this.full = this.#full.promise;
    child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-2048);
    });
    this.ended = new Promise((resolve) => {
      child.once("error", (error) => resolve(messageOf(error)));
      child.once("close", (code, signal) => resolve(`it ended (${signal ?? `code ${code ?? "unknown"}`})`));
    });
    // Its end is told by the process's.
    void closed(this.#control);
    hear(this.#control, (message) => this.#take(message as Report));
    // It must not keep this process alive: its task begins when that has ended.
    child.unref();
    this.#control.unref();
    (child.stderr as Socket | null)?.unref();
  }

  /**
   * Starts a guard and waits until it holds everything.
   *
   * @throws {GuardError} when that does not come about
   */
  static async start(
    details: HoldDetails,
    given: GivenDescriptors,
  ): Promise<{ readonly guard: GuardProcess; readonly identity: ProcessIdentity }> {
    const previous = given.previous?.descriptor;
    const descriptors = [given.qmp, previous, ...given.connections].filter((fd) => fd !== undefined);
    const placeOf = (fd: number | undefined): number | null =>
      fd === undefined ? null : FIRST_GIVEN + descriptors.indexOf(fd);
    const guard = new GuardProcess(spawnGuard(details.run, descriptors));
    await step("guard spawned");
    say(guard.#control, {
      ...details,
      order: "hold",
      qmp: placeOf(given.qmp),
      previous: placeOf(previous),
      connections: given.connections.map((fd) => FIRST_GIVEN + descriptors.indexOf(fd)),
    });
    const failed = guard.ended.then((how) => {
      throw new GuardError(`${how}${guard.#stderr === "" ? "" : `: ${guard.#stderr.trim()}`}`);
    });
    failed.catch(() => undefined);
    try {
      const what = "Start the guard";
      const identity = await withDeadline(
        Promise.race([guard.#holding.promise, failed]),
        START_DEADLINE,
        what,
      );
      return { guard, identity };
    } catch (error) {
      guard.#child.kill("SIGKILL");
      throw error instanceof GuardError ? error : new GuardError(messageOf(error), { cause: error });
    }
  }

  /** The agent's end of the control connection; undefined when closed. */
  get descriptor(): number | undefined {
    // Node offers no public way; `stdio: [fd]` of child processes is documented to take it.
    const { _handle } = this.#control as unknown as { readonly _handle: { readonly fd?: number } | null };
    return _handle?.fd !== undefined && _handle.fd >= 0 ? _handle.fd : undefined;
  }

  tell(order: Exclude<Order, HoldOrder>): void {
    say(this.#control, order);
  }

  /** Has it close its NBD connections; they are closed when this resolves, and if that takes its end. */
  async letGo(): Promise<void> {
    this.tell({ order: "letGo" });
    await this.#answer(this.#letGone.promise);
  }

  /** Ends it: its work is done. */
  async end(): Promise<void> {
    this.tell({ order: "done" });
    await this.#answer(this.ended);
  }

  /** Leaves the run to it. */
  leave(): void {
    this.#control.destroy();
  }

  async #answer(answer: Promise<unknown>): Promise<void> {
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), ANSWER_DEADLINE);
    await Promise.race([answer, this.ended]);
    clearTimeout(timer);
  }

  #take(message: Report): void {
    switch (message.report) {
      case "holding":
        this.#holding.resolve(message.guard);
        break;
      case "full":
        this.#full.resolve(message.what);
        break;
      case "letGone":
        this.#letGone.resolve(undefined);
    }
  }
}

/** The run's id is there for people who look at the list of processes. */
function spawnGuard(run: string, descriptors: readonly number[]): ChildProcess {
  try {
    return spawn(process.execPath, [...program(), run], {
      detached: true,
      stdio: ["ignore", "ignore", "pipe", "pipe", ...descriptors],
    });
  } catch (error) {
    throw new GuardError(messageOf(error), { cause: error });
  }
}

/** Node's arguments: the compiled entry or, from sources (tests, tsx), the TypeScript one. */
function program(): string[] {
  const entry = new URL("./entry.js", import.meta.url);
  if (!import.meta.url.endsWith(".ts")) return [fileURLToPath(entry)];
  const tsx = createRequire(import.meta.url).resolve("tsx/esm");
  return ["--import", pathToFileURL(tsx).href, fileURLToPath(entry).replace(/\.js$/, ".ts")];
}
