import { randomInt } from "node:crypto";
import type { Socket } from "node:net";
import { DeadlineError, deferred, withDeadline, type Deferred } from "../flow/index.js";
import { formatQmpAddress, type QmpAddress } from "./address.js";
import {
  COMMANDS,
  type CommandArguments,
  type CommandName,
  type CommandResult,
  type CommandsWithout,
} from "./commands.js";
import { connectSocket } from "./connect.js";
import { QmpBusyError, QmpClosedError, QmpCommandError, QmpProtocolError } from "./errors.js";
import { EventWatch, type EventFilter } from "./events.js";
import { MessageFraming } from "./framing.js";
import {
  decodeMessage,
  encodeCommand,
  excerpt,
  idOf,
  type QmpGreeting,
  type ServerMessage,
} from "./messages.js";
import { QmpSchema } from "./schema.js";

/** Options of `QmpClient.connect`. */
export interface ConnectOptions {
  readonly signal?: AbortSignal | undefined;
  /** How long to wait for the greeting, in milliseconds; default 5000. */
  readonly greetingTimeoutMs?: number | undefined;
}

/** Options of a command. */
export interface ExecuteOptions {
  /** Aborting ends the wait, not the command: QEMU may still carry it out. */
  readonly signal?: AbortSignal | undefined;
  /** How long to wait for the reply, in milliseconds; default 30 000. */
  readonly timeoutMs?: number | undefined;
}

/** Ids of a connection that was taken over: none that whoever had it before can have used. */
const ADOPTED_IDS = { from: 2 ** 40, below: 2 ** 41 };

/** The longest timer that Node has: 24 days. */
const LONGEST_WAIT = 2 ** 31 - 1;

interface Pending {
  readonly command: string;
  readonly reply: Deferred<unknown>;
}

/**
 * A connection to a QMP monitor, greeted and past its capability negotiation. One reader takes all messages;
 * replies find their command by id, events go to the watches. When the connection dies, every wait on it ends
 * at once with the reason.
 */
export class QmpClient implements AsyncDisposable {
  readonly address: QmpAddress;
  readonly #socket: Socket;
  readonly #framing = new MessageFraming();
  readonly #pending = new Map<number, Pending>();
  /** Commands whose waiter has left; their replies are still to come. */
  readonly #abandoned = new Set<number>();
  readonly #watches = new Set<EventWatch>();
  readonly #greeted = deferred<QmpGreeting>();
  readonly #closed = deferred<Error | undefined>();
  #greeting: QmpGreeting | undefined;
  /** After a take-over: the id of the first command of ours; what comes before its reply was not meant for us. */
  #firstId: number | undefined;
  #schema: Promise<QmpSchema> | undefined;
  #lastId = 0;
  #end: Error | undefined;
  #closing = false;

  private constructor(address: QmpAddress, socket: Socket) {
    this.address = address;
    this.#socket = socket;
    socket.on("data", (chunk: Buffer) => this.#receive(chunk));
    socket.on("error", (cause) => this.#fail(new QmpClosedError(this.#say(cause.message), { cause })));
    socket.on("close", () =>
      this.#fail(
        new QmpClosedError(this.#say("the monitor closed the connection"), {
          hint: "QEMU has ended, or another program took its monitor over",
        }),
      ),
    );
  }

  /**
   * Connects, waits for the greeting and negotiates (no capability is needed).
   *
   * @throws {QmpBusyError} when no greeting comes in time: the monitor serves another client
   * @throws {QmpProtocolError} when something else than QMP answers
   * @throws {QmpNotFoundError} when nothing listens there
   */
  static async connect(address: QmpAddress, options: ConnectOptions = {}): Promise<QmpClient> {
    const { signal, greetingTimeoutMs = 5000 } = options;
    const client = new QmpClient(address, await connectSocket(address, { signal }));
    try {
      client.#greeting = await withDeadline(
        client.#greeted.promise,
        greetingTimeoutMs,
        client.#say("greeting"),
        {
          signal,
        },
      );
      await client.call("qmp_capabilities", undefined, { signal, timeoutMs: greetingTimeoutMs });
      return client;
    } catch (error) {
      client.#socket.destroy();
      if (!(error instanceof DeadlineError) || client.#greeting !== undefined) throw error;
      throw new QmpBusyError(
        client.#say(`no greeting within ${greetingTimeoutMs / 1000} s: another client holds this monitor`),
        {
          cause: error,
          hint: "Close the other client, or start QEMU with a second monitor (-qmp unix:PATH,server=on,wait=off)",
        },
      );
    }
  }

  /**
   * Goes on with a connection whose other user has died, however far that one had got: perhaps in the middle of
   * a command, of a reply, or with replies still to come. QEMU drops half a command at the byte 0xFF, which no JSON
   * text holds; whatever it says before it answers the first command of ours is not for us.
   *
   * @param socket nobody else must read it
   * @param options.timeoutMs how long QEMU may take; default as long as it needs: it may still carry out a command
   * @throws {QmpClosedError} when the connection has ended
   * @throws {DeadlineError} when QEMU does not answer in time
   */
  static async adopt(address: QmpAddress, socket: Socket, options: ExecuteOptions = {}): Promise<QmpClient> {
    const client = new QmpClient(address, socket);
    client.#greeting = client.greeting;
    client.#lastId = randomInt(ADOPTED_IDS.from, ADOPTED_IDS.below);
    client.#firstId = client.#lastId + 1;
    socket.write(Buffer.of(0xff));
    try {
      const { signal, timeoutMs = LONGEST_WAIT } = options;
      await client.call("query-version", undefined, { signal, timeoutMs });
      return client;
    } catch (error) {
      socket.destroy();
      throw error;
    }
  }

  /** What QEMU said first: its version. */
  get greeting(): QmpGreeting {
    return this.#greeting ?? { version: { major: 0, minor: 0, micro: 0 }, package: "", capabilities: [] };
  }

  /** Resolves when the connection has ended: with the reason, or with nothing after `close()`. */
  get closed(): Promise<Error | undefined> {
    return this.#closed.promise;
  }

  /** The socket's file descriptor, to be duplicated into a child process; undefined when closed. */
  get fileDescriptor(): number | undefined {
    // Node offers no public way; `stdio: [fd]` of child processes is documented to take it.
    const { _handle } = this.#socket as unknown as { readonly _handle: { readonly fd?: number } | null };
    return _handle?.fd !== undefined && _handle.fd >= 0 ? _handle.fd : undefined;
  }

  /** Number of commands whose reply is awaited. */
  get pending(): number {
    return this.#pending.size;
  }

  /**
   * Runs a command of the typed table; the result is decoded and checked.
   *
   * @throws {QmpCommandError} when QEMU refuses it
   * @throws {QmpProtocolError} when the result is not what the QAPI schema says
   * @throws {DeadlineError} when no reply comes in time; whether QEMU carries the command out is unknown then
   * @throws {ConnectionError} when the connection is or goes dead
   */
  execute<C extends CommandsWithout>(
    command: C,
    args?: undefined,
    options?: ExecuteOptions,
  ): Promise<CommandResult<C>>;
  execute<C extends Exclude<CommandName, CommandsWithout>>(
    command: C,
    args: CommandArguments<C>,
    options?: ExecuteOptions,
  ): Promise<CommandResult<C>>;
  async execute(command: CommandName, args?: object, options: ExecuteOptions = {}): Promise<unknown> {
    return COMMANDS[command].decode(await this.call(command, args, options));
  }

  /** Runs any command; the result comes as it is, unchecked. Errors as `execute`. */
  async call(command: string, args?: object, options: ExecuteOptions = {}): Promise<unknown> {
    const { signal, timeoutMs = 30_000 } = options;
    signal?.throwIfAborted();
    if (this.#end !== undefined) throw this.#end;
    const id = (this.#lastId += 1);
    const reply = deferred<unknown>();
    this.#pending.set(id, { command, reply });
    this.#socket.write(encodeCommand(id, command, args));
    try {
      return await withDeadline(reply.promise, timeoutMs, `Run ${command} in QEMU`, { signal });
    } finally {
      if (this.#pending.delete(id)) this.#abandoned.add(id);
    }
  }

  /** Collects events from now on; dispose of the watch when done (`using watch = client.watch(…)`). */
  watch(filter: EventFilter): EventWatch {
    const watch = new EventWatch(filter, (ended) => this.#watches.delete(ended));
    if (this.#end === undefined) this.#watches.add(watch);
    else watch.end(this.#end);
    return watch;
  }

  /** QEMU's description of itself, asked for once. */
  schema(options: ExecuteOptions = {}): Promise<QmpSchema> {
    this.#schema ??= this.execute("query-qmp-schema", undefined, options).then(
      (value) => QmpSchema.index(value),
      (error: unknown) => {
        this.#schema = undefined;
        throw error;
      },
    );
    return this.#schema;
  }

  /** Closes the connection; waits that are left end with an error. Never throws. */
  async close(): Promise<void> {
    if (this.#end === undefined) {
      this.#closing = true;
      this.#fail(new QmpClosedError(this.#say("closed on our side")));
    }
    await this.#closed.promise;
  }

  /** As `close`, and for whoever has a duplicate of the connection, too (shutdown(2)): the monitor is free. Never throws. */
  async hangUp(): Promise<void> {
    if (this.#end === undefined) {
      this.#closing = true;
      await new Promise<void>((resolve) => {
        this.#socket.once("close", () => resolve());
        this.#socket.end(() => resolve());
      });
    }
    await this.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #say(what: string): string {
    return `Talk to QMP monitor ${formatQmpAddress(this.address)}: ${what}`;
  }

  #receive(chunk: Buffer): void {
    try {
      for (const text of this.#framing.push(chunk)) {
        if (this.#end !== undefined) return;
        if (this.#isForFormerUser(text)) continue;
        this.#dispatch(decodeMessage(text));
      }
      this.#refuseForeignGreeting();
    } catch (error) {
      this.#fail(error as Error);
    }
  }

  #isForFormerUser(text: string): boolean {
    if (this.#firstId === undefined) return false;
    if (idOf(text) !== this.#firstId) return true;
    this.#firstId = undefined;
    return false;
  }

  /** Another protocol's greeting may never end its line (NBD), so it is judged by its first bytes. */
  #refuseForeignGreeting(): void {
    const text = this.#framing.unfinished;
    if (this.#greeting !== undefined || text === "" || text.startsWith("{")) return;
    throw new QmpProtocolError(this.#say(`this is no QMP monitor, it begins with ${excerpt(text)}`), {
      hint: "Give the path of QEMU's QMP socket (-qmp, or -mon mode=control)",
    });
  }

  #dispatch(message: ServerMessage): void {
    switch (message.kind) {
      case "greeting":
        this.#greeted.resolve(message.greeting);
        return;
      case "event":
        for (const watch of this.#watches) watch.offer(message.event);
        return;
      case "error":
        if (message.id === undefined) {
          throw new QmpProtocolError(
            this.#say(`QEMU answers no command in particular: ${message.description}`),
          );
        }
        this.#take(message.id, (pending) =>
          pending.reply.reject(new QmpCommandError(pending.command, message.class, message.description)),
        );
        return;
      case "return":
        this.#take(message.id, (pending) => pending.reply.resolve(message.value));
    }
  }

  #take(id: unknown, settle: (pending: Pending) => void): void {
    const pending = this.#pending.get(id as number);
    if (pending !== undefined) {
      this.#pending.delete(id as number);
      settle(pending);
    } else if (!this.#abandoned.delete(id as number)) {
      throw new QmpProtocolError(
        this.#say(`reply to a command that is not under way, id ${JSON.stringify(id)}`),
      );
    }
  }

  #fail(error: Error): void {
    if (this.#end !== undefined) return;
    this.#end = error;
    this.#socket.destroy();
    this.#greeted.reject(error);
    for (const { reply } of this.#pending.values()) reply.reject(error);
    this.#pending.clear();
    for (const watch of this.#watches) watch.end(error);
    this.#watches.clear();
    this.#closed.resolve(this.#closing ? undefined : error);
  }
}
