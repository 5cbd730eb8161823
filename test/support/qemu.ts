import { spawn, type ChildProcessByStdio } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Readable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { DeadlineError, withDeadline } from "../../src/flow/index.js";
import { installGuest, type Guest } from "./guest.js";
import { failureOf } from "./image.js";
import { TestMonitor } from "./monitor.js";
import { diskArguments, diskNames, escapeCommas, type DiskNames, type TestDisk } from "./qemu-arguments.js";
import { spawnError } from "./tools.js";

export type { Bus, DiskNames, TestDisk } from "./qemu-arguments.js";
export type { CounterOptions, Guest } from "./guest.js";

/** What a test machine is made of. */
export interface MachineOptions {
  /** Where its sockets' own directory is made; default the system's temporary directory. */
  readonly directory?: string;
  /** The first one is booted from. */
  readonly disks: readonly TestDisk[];
  /** What it boots; default `idle`. `none`: it is not started (-S) and its disks are not touched. */
  readonly guest?: Guest;
  /** QMP monitors in all, the test's own included; default 2. */
  readonly monitors?: number;
  readonly extraArguments?: readonly string[];
  readonly uuid?: string;
  readonly name?: string;
  /** Milliseconds after which the machine is killed, whatever the test does; default 120,000. */
  readonly deadline?: number;
}

/** How a machine's process ended. */
export interface MachineExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

interface BlockDevice {
  readonly qdev?: string;
  readonly inserted?: { readonly "node-name"?: string };
}

interface BlockStatistics {
  readonly device?: string;
  readonly "node-name"?: string;
  readonly qdev?: string;
  readonly stats: { readonly wr_operations: number };
}

type Child = ChildProcessByStdio<null, Readable, Readable>;

/** CPU seconds that a machine may use: bounds one that nobody is left to end. */
const CPU_SECONDS = 900;

/** The first of the programs that turn into QEMU. */
const WATCHER = "prlimit";

/**
 * Starts a real machine under QEMU (TCG, 32 MiB, type `pc`, nothing but its disks) and waits until its
 * monitors serve. Its process dies with the test's process, also when that one is killed, and at its deadline.
 *
 * @throws when QEMU ends before, with what it wrote to stderr
 */
export async function startMachine(options: MachineOptions): Promise<TestMachine> {
  const { guest = "idle", disks } = options;
  const bootDisk = disks[0];
  if (guest !== "none" && bootDisk !== undefined) {
    await installGuest(bootDisk.path, bootDisk.format, guest);
  }
  const directory = await mkdtemp(join(options.directory ?? tmpdir(), "vm-"));
  // QEMU connects to the test's monitor socket: so there is nothing to poll until it is up.
  const server = createServer();
  server.listen(join(directory, "test.sock"));
  await once(server, "listening");
  const sockets = Array.from({ length: (options.monitors ?? 2) - 1 }, (_, index) =>
    join(directory, `qmp${index}.sock`),
  );
  const machine = spawnMachine(options, directory, sockets);
  try {
    const ended = machine.exited.then(({ code, signal }) => {
      throw new Error(`QEMU ended (${signal ?? `code ${code ?? "unknown"}`}):\n${machine.stderr}`);
    });
    // From the greeting on the end of QEMU is the test's matter, told by `exited`.
    ended.catch(() => undefined);
    // A monitor that closes is a machine that ends: that error tells more.
    const monitor = greeted(server).catch((error: unknown) =>
      withDeadline(ended, 2000, "Wait for QEMU's end").catch((end: unknown) => {
        throw end instanceof DeadlineError ? error : end;
      }),
    );
    machine.adopt(await withDeadline(Promise.race([monitor, ended]), 20_000, "Start QEMU"));
  } catch (error) {
    await machine[Symbol.asyncDispose]();
    throw error;
  } finally {
    server.close();
  }
  return machine;
}

async function greeted(server: Server): Promise<TestMonitor> {
  const [socket] = (await once(server, "connection")) as [Socket];
  return TestMonitor.over(socket);
}

function spawnMachine(options: MachineOptions, directory: string, sockets: readonly string[]): TestMachine {
  const { guest = "idle", disks, name, uuid, extraArguments = [] } = options;
  const qemu = [
    "qemu-system-x86_64",
    ...["-accel", "tcg", "-machine", "pc", "-m", "32", "-smp", "1"],
    ...["-nodefaults", "-no-user-config", "-display", "none"],
    ...sockets.flatMap((path, index) => [
      ...["-chardev", `socket,id=mon${index},path=${escapeCommas(path)},server=on,wait=off`],
      ...["-mon", `chardev=mon${index},mode=control`],
    ]),
    ...["-chardev", `socket,id=test,path=${escapeCommas(join(directory, "test.sock"))}`],
    ...["-mon", "chardev=test,mode=control"],
    ...(name === undefined ? [] : ["-name", escapeCommas(name)]),
    ...(uuid === undefined ? [] : ["-uuid", uuid]),
    ...(guest === "none" ? ["-S"] : []),
    ...diskArguments(disks),
    ...extraArguments,
  ];
  // All three replace themselves by the next, so the child is QEMU itself. setpriv: the kernel kills it when
  // this process dies. stdbuf: HMP qemu-io prints to QEMU's stdout, which is to be read while it runs.
  const limits = [
    "--core=0",
    `--cpu=${CPU_SECONDS}`,
    "setpriv",
    "--pdeathsig",
    "KILL",
    "stdbuf",
    "-oL",
    ...qemu,
  ];
  const child = spawn(WATCHER, limits, { stdio: ["ignore", "pipe", "pipe"] });
  return new TestMachine(child, directory, sockets, disks, options.deadline ?? 120_000);
}

/** A running machine. `await using` ends it and removes its sockets. */
export class TestMachine implements AsyncDisposable {
  /** The directory of its sockets, its own. */
  readonly directory: string;
  /** All QMP sockets but the test's own; nobody is connected to them. */
  readonly qmpSockets: readonly string[];
  /** Resolves when the process has ended, however. */
  readonly exited: Promise<MachineExit>;
  readonly #child: Child;
  readonly #disks: readonly DiskNames[];
  /** Numbers of the disks that a guest can write to. */
  readonly #writable: readonly number[];
  readonly #timer: NodeJS.Timeout;
  #monitor: TestMonitor | undefined;
  #stdout = "";
  #stderr = "";
  readonly #onOutput = new Set<() => void>();

  /** Use `startMachine`. */
  constructor(
    child: Child,
    directory: string,
    qmpSockets: readonly string[],
    disks: readonly TestDisk[],
    deadline: number,
  ) {
    this.#child = child;
    this.directory = directory;
    this.qmpSockets = qmpSockets;
    this.#disks = disks.map(diskNames);
    this.#writable = [...disks.keys()].filter(
      (index) => disks[index]?.readOnly !== true && disks[index]?.cdrom !== true,
    );
    child.stdout.setEncoding("utf8").on("data", (text: string) => {
      this.#stdout += text;
      for (const listener of this.#onOutput) listener();
    });
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr += text;
    });
    this.exited = new Promise((resolve) => {
      child.once("error", (error) => {
        this.#stderr += spawnError(WATCHER, error).message;
        resolve({ code: null, signal: null });
      });
      child.once("close", (code, signal) => resolve({ code, signal }));
    });
    this.#timer = setTimeout(() => {
      this.#stderr += `(killed by the test's deadline of ${deadline / 1000} s)\n`;
      child.kill("SIGKILL");
    }, deadline);
    this.#timer.unref();
  }

  /** The QMP socket for tidemark. */
  get qmp(): string {
    const [first] = this.qmpSockets;
    if (first === undefined) throw new Error("This machine was started with the test's own monitor alone");
    return first;
  }

  /** The process id of QEMU itself. */
  get pid(): number {
    if (this.#child.pid === undefined) throw new Error("QEMU was not started");
    return this.#child.pid;
  }

  /** The test's own monitor. */
  get monitor(): TestMonitor {
    if (this.#monitor === undefined) throw new Error("The machine has not connected yet");
    return this.#monitor;
  }

  /** What QEMU wrote to stderr so far. */
  get stderr(): string {
    return this.#stderr;
  }

  /** The names under which QEMU knows its disks, in the order of the options. */
  get disks(): readonly DiskNames[] {
    return this.#disks;
  }

  /** For `startMachine`. */
  adopt(monitor: TestMonitor): void {
    this.#monitor = monitor;
  }

  /** Runs a command of the human monitor. @returns what it printed there */
  async hmp(text: string): Promise<string> {
    return this.monitor.hmp(text);
  }

  /**
   * Runs a command of qemu-io through the device, as if the guest did it: bitmaps and copy-before-write see it.
   *
   * @param disk the disk's number in the options, its device id or drive id; anything else is passed to
   *   `qemu-io` as it is (`-d <qdev path>`, a node name)
   * @returns what it printed
   * @throws when the device is unknown, or the command failed
   */
  async qemuIo(disk: number | string, command: string): Promise<string> {
    const backend = await this.#backendOf(disk);
    const start = this.#stdout.length;
    const refused = await this.hmp(`qemu-io ${backend} "${command}"`);
    if (refused.trim() !== "") throw new Error(`qemu-io ${backend} "${command}": ${refused.trim()}`);
    // Commands print nothing, or several lines, to QEMU's stdout: `length` marks where this one's end.
    const text = await this.#outputUpToMark(backend, start);
    const failure = failureOf(text);
    if (failure !== undefined) throw new Error(`qemu-io ${backend} "${command}": ${failure}`);
    return text;
  }

  /** Runs several commands, in order. */
  async qemuIoAll(disk: number | string, commands: readonly string[]): Promise<void> {
    for (const command of commands) await this.qemuIo(disk, command);
  }

  /**
   * Waits until the guest has written at least so many more times to each disk that it writes to.
   *
   * @param writes more writes of each disk, from now on (the counting guest writes twice a step)
   * @param disks numbers of the disks to watch; default all that can be written
   * @throws when that does not happen within 30 s
   */
  async waitForGuestWriting(writes = 4, disks?: readonly number[]): Promise<void> {
    const before = await this.#writeCounts();
    const watched = disks ?? [...this.#writable];
    if (watched.length === 0) throw new Error("The guest cannot write: the machine has no writable disk");
    const deadline = performance.now() + 30_000;
    // QEMU has no event for a guest's write.
    for (;;) {
      const now = await this.#writeCounts();
      if (watched.every((index) => (now[index] ?? 0) >= (before[index] ?? 0) + writes)) return;
      if (performance.now() > deadline) {
        throw new Error(
          `The guest does not write: ${before.join(", ")} writes, 30 s later ${now.join(", ")}`,
        );
      }
      await sleep(5);
    }
  }

  /** Ends it cleanly, as `quit` does: persistent bitmaps are stored. */
  async quit(): Promise<MachineExit> {
    // QEMU may close the monitor before its answer is read.
    await this.monitor.execute("quit").catch((error: unknown) => {
      if (!(error instanceof Error) || !error.message.includes("closed its monitor")) throw error;
    });
    return withDeadline(this.exited, 30_000, "Wait for QEMU's end");
  }

  /** Kills it with SIGKILL: what a crash leaves. */
  async kill(): Promise<MachineExit> {
    this.#child.kill("SIGKILL");
    return this.exited;
  }

  /** Kills it if it still runs, and removes its directory. Never throws. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.exited;
    clearTimeout(this.#timer);
    this.#monitor?.close();
    await rm(this.directory, { recursive: true, force: true }).catch(() => undefined);
  }

  async #backendOf(disk: number | string): Promise<string> {
    const found =
      typeof disk === "number"
        ? this.#disks[disk]
        : this.#disks.find(({ device, drive }) => device === disk || drive === disk);
    if (found?.backend !== undefined) return found.backend;
    if (typeof disk === "string") return disk;
    // An anonymous device has a path all the same, which QEMU numbers.
    const devices = await this.monitor.execute<BlockDevice[]>("query-block");
    const anonymous = devices.find((one) => one.inserted?.["node-name"] === found?.node);
    if (anonymous?.qdev === undefined) throw new Error(`The machine has no device for disk ${disk}`);
    return `-d ${anonymous.qdev}`;
  }

  async #outputUpToMark(backend: string, start: number): Promise<string> {
    await this.hmp(`qemu-io ${backend} "length"`);
    const mark = /^[\d.]+ (bytes|[KMGTPE]iB)\n/m;
    const output = new Promise<string>((resolve) => {
      const look = (): void => {
        const text = this.#stdout.slice(start);
        const found = mark.exec(text);
        if (found === null) return;
        this.#onOutput.delete(look);
        resolve(text.slice(0, found.index));
      };
      this.#onOutput.add(look);
      look();
    });
    return withDeadline(output, 10_000, `Read what qemu-io ${backend} printed`);
  }

  async #writeCounts(): Promise<(number | undefined)[]> {
    const all = await this.monitor.execute<BlockStatistics[]>("query-blockstats");
    return this.#disks.map(({ drive, device, node }) => {
      const statistics = all.find(
        (one) =>
          (drive !== undefined && one.device === drive) ||
          (device !== undefined && one.qdev?.split("/").includes(device) === true) ||
          (device === undefined && node !== undefined && one["node-name"] === node),
      );
      return statistics?.stats.wr_operations;
    });
  }
}
