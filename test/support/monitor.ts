import type { Socket } from "node:net";
import { connect } from "node:net";
import { deferred, withDeadline, type Deferred } from "../../src/flow/index.js";
import { formatLine, isRecord, parseLine, readLines, writeLine } from "./json-lines.js";

/** An event of QEMU, as it came. */
export interface MonitorEvent {
  readonly event: string;
  readonly data: Readonly<Record<string, unknown>>;
}

/** QEMU refused a command. */
export class MonitorError extends Error {
  readonly command: string;
  /** QEMU's error class, nearly always `GenericError`. */
  readonly errorClass: string;

  constructor(command: string, errorClass: string, description: string) {
    super(`${command}: ${description}`);
    this.name = "MonitorError";
    this.command = command;
    this.errorClass = errorClass;
  }
}

interface Waiter extends Deferred<MonitorEvent> {
  readonly matches: (event: MonitorEvent) => boolean;
}

const DEADLINE = 30_000;

/**
 * A test's own QMP connection: as plain as can be, and none of the code under test.
 * Commands may overlap; QEMU answers in order.
 */
export class TestMonitor {
  readonly #socket: Socket;
  readonly #pending = new Map<number, { readonly command: string; readonly answer: Deferred<unknown> }>();
  readonly #waiters = new Set<Waiter>();
  readonly #events: MonitorEvent[] = [];
  readonly #greeting = deferred<undefined>();
  #nextId = 1;
  #closed = false;

  private constructor(socket: Socket) {
    this.#socket = socket;
    readLines(socket, (line) => this.#receive(line));
    // What a broken connection does to its waiters is told on close.
    socket.on("error", () => undefined);
    socket.on("close", () => this.#end());
  }

  /** Connects to a QMP socket and negotiates. @throws when nothing greets within 10 s: another client has it */
  static async connect(path: string): Promise<TestMonitor> {
    return TestMonitor.over(connect(path));
  }

  /** Negotiates on a socket that QEMU is at the other end of. */
  static async over(socket: Socket): Promise<TestMonitor> {
    const monitor = new TestMonitor(socket);
    try {
      await withDeadline(monitor.#greeting.promise, 10_000, "Wait for the QMP greeting");
      await monitor.execute("qmp_capabilities");
    } catch (error) {
      monitor.close();
      throw error;
    }
    return monitor;
  }

  /** All events so far, oldest first. */
  get events(): readonly MonitorEvent[] {
    return this.#events;
  }

  /**
   * Runs a command.
   *
   * @returns what QEMU returned; the caller says what it expects
   * @throws {MonitorError} when QEMU refuses it
   * @throws when the machine ends, or after 30 s
   */
  async execute<T = unknown>(command: string, args?: Readonly<Record<string, unknown>>): Promise<T> {
    if (this.#closed) throw new Error(`${command}: the monitor is closed`);
    const id = this.#nextId++;
    const answer = deferred<unknown>();
    this.#pending.set(id, { command, answer });
    const request = { execute: command, ...(args === undefined ? {} : { arguments: args }), id };
    writeLine(this.#socket, formatLine(request));
    try {
      return (await withDeadline(answer.promise, DEADLINE, command)) as T;
    } finally {
      this.#pending.delete(id);
    }
  }

  /** Runs a command of the human monitor. @returns what it printed */
  async hmp(text: string): Promise<string> {
    return this.execute<string>("human-monitor-command", { "command-line": text });
  }

  /**
   * Waits for an event from now on: call it before the command that causes the event, await it after.
   *
   * @param matches narrows it down by the event's data
   */
  async nextEvent(
    name: string,
    matches: (data: MonitorEvent["data"]) => boolean = () => true,
    milliseconds = DEADLINE,
  ): Promise<MonitorEvent> {
    const waiter: Waiter = {
      ...deferred<MonitorEvent>(),
      matches: (event) => event.event === name && matches(event.data),
    };
    if (this.#closed) waiter.reject(new Error(`Wait for ${name}: the monitor is closed`));
    this.#waiters.add(waiter);
    try {
      return await withDeadline(waiter.promise, milliseconds, `Wait for ${name}`);
    } finally {
      this.#waiters.delete(waiter);
    }
  }

  close(): void {
    this.#socket.destroy();
    this.#end();
  }

  #receive(line: string): void {
    const message = parseLine(line);
    if (message === undefined) return;
    if ("QMP" in message) {
      this.#greeting.resolve(undefined);
    } else if (typeof message["event"] === "string") {
      const event = { event: message["event"], data: isRecord(message["data"]) ? message["data"] : {} };
      this.#events.push(event);
      for (const waiter of this.#waiters) if (waiter.matches(event)) waiter.resolve(event);
    } else {
      this.#answer(message);
    }
  }

  #answer(message: Record<string, unknown>): void {
    const pending = this.#pending.get(Number(message["id"]));
    if (pending === undefined) return;
    const error = message["error"];
    if (isRecord(error)) {
      const description = String(error["desc"]);
      pending.answer.reject(new MonitorError(pending.command, String(error["class"]), description));
    } else {
      pending.answer.resolve(message["return"]);
    }
  }

  #end(): void {
    if (this.#closed) return;
    this.#closed = true;
    const reason = new Error("The machine closed its monitor");
    this.#greeting.reject(reason);
    for (const { answer } of this.#pending.values()) answer.reject(reason);
    for (const waiter of this.#waiters) waiter.reject(reason);
  }
}
