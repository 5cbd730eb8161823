import type { Socket } from "node:net";
import { deferred, type Deferred } from "../../src/flow/index.js";
import { formatLine, parseLine, readLines, writeLine } from "./json-lines.js";

interface Expected extends Deferred<string> {
  /** The command's id as JSON; undefined when it has none. */
  readonly id: string | undefined;
}

/** One client of the QMP proxy and its connection to QEMU. Commands go one after another; QEMU answers in order. */
export class ProxySession {
  /** Resolves when both connections are closed; rejects when the proxy itself failed. */
  readonly ended: Promise<void>;
  readonly #client: Socket;
  readonly #qemu: Socket;
  readonly #end = deferred<undefined>();
  #expected: Expected | undefined;
  #work: Promise<void> = Promise.resolve();
  #ownCommands = 0;
  #isUndisturbed = false;
  #isEnding = false;

  constructor(client: Socket, qemu: Socket, pass: (line: string, session: ProxySession) => Promise<void>) {
    this.#client = client;
    this.#qemu = qemu;
    readLines(client, (line) => {
      this.#work = this.#work.then(() => pass(line, this)).catch((error: unknown) => this.#fail(error));
    });
    readLines(qemu, (line) => this.#fromQemu(line));
    // What a broken connection means is told on close.
    for (const socket of [client, qemu]) socket.on("error", () => undefined);
    // What a client sent before it went away still reaches QEMU, as it would have from the socket's buffer.
    client.on("end", () => void this.#work.then(() => this.end()));
    client.on("close", () => void this.#work.then(() => this.end()));
    qemu.on("close", () => {
      this.#expected?.reject(new ConnectionGone());
      this.end();
    });
    this.ended = Promise.all([closed(client), closed(qemu), this.#end.promise]).then(() => undefined);
  }

  toQemu(line: string): void {
    writeLine(this.#qemu, line);
  }

  toClient(line: string): void {
    writeLine(this.#client, line);
  }

  /** Sends the client's command and waits for the answer, which the caller passes on. */
  async exchange(line: string, id: unknown): Promise<string> {
    const expected: Expected = {
      ...deferred<string>(),
      id: id === undefined ? undefined : JSON.stringify(id),
    };
    if (this.#qemu.destroyed) throw new ConnectionGone();
    this.#expected = expected;
    this.toQemu(line);
    try {
      return await expected.promise;
    } finally {
      this.#expected = undefined;
    }
  }

  /** Runs a command of the proxy's own, unseen by the client. @throws when QEMU refuses it */
  async execute<T = unknown>(execute: string, args: Readonly<Record<string, unknown>> = {}): Promise<T> {
    const id = `proxy-${this.#ownCommands++}`;
    const reply = parseLine(await this.exchange(formatLine({ execute, arguments: args, id }), id));
    if (reply === undefined || "error" in reply) {
      throw new Error(`The proxy's own ${execute} failed: ${JSON.stringify(reply)}`);
    }
    return reply["return"] as T;
  }

  /** Runs what must come to its end even when the client goes away, hiding the machine's STOP and RESUME. */
  async undisturbed<T>(work: () => Promise<T>): Promise<T> {
    this.#isUndisturbed = true;
    try {
      return await work();
    } finally {
      this.#isUndisturbed = false;
      if (this.#isEnding) this.end();
    }
  }

  /** Closes both connections, after a freeze that is under way. */
  end(): void {
    this.#isEnding = true;
    if (this.#isUndisturbed && !this.#qemu.destroyed) return;
    this.#qemu.destroySoon();
    this.#client.destroySoon();
    this.#end.resolve(undefined);
  }

  #fail(error: unknown): void {
    // A connection that ended in mid-command is no failure of the proxy.
    if (!(error instanceof ConnectionGone)) this.#end.reject(error);
    this.end();
  }

  #fromQemu(line: string): void {
    const message = parseLine(line);
    const isReply = message !== undefined && ("return" in message || "error" in message);
    if (isReply && this.#expected !== undefined) {
      const id = message["id"] === undefined ? undefined : JSON.stringify(message["id"]);
      if (id === this.#expected.id) {
        this.#expected.resolve(line);
        return;
      }
    }
    const isHidden =
      this.#isUndisturbed && (message?.["event"] === "STOP" || message?.["event"] === "RESUME");
    if (!isHidden) this.toClient(line);
  }
}

/** One of the two connections ended while a command was under way. */
class ConnectionGone extends Error {}

function closed(socket: Socket): Promise<void> {
  return new Promise((resolve) => socket.once("close", () => resolve()));
}
