import { once } from "node:events";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { formatLine, isRecord, parseLine } from "./json-lines.js";
import { ProxySession } from "./proxy-session.js";
import { copyReferences, locateDisks, type Reference } from "./reference.js";

export type { Reference } from "./reference.js";

/** A command on its way through the proxy. */
export interface ProxiedCommand {
  readonly name: string;
  readonly arguments: Readonly<Record<string, unknown>>;
  /** How often this command has come, this one included. */
  readonly occurrence: number;
}

/** QEMU's answer to it, as hooks and the record see it. */
export interface ProxiedReply {
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
}

/**
 * What a hook wants instead of the usual course: an error as the answer, no answer at all, or both connections cut.
 * From a hook before the command: QEMU never gets it. From one after it: QEMU has done it.
 * A client that is killed while its command is held does not take the command back: "disconnect" does.
 */
export type HookVerdict =
  { readonly error: string; readonly class?: string } | "silence" | "disconnect" | undefined;

/** @param reply QEMU's answer; undefined before the command */
export type CommandHook = (
  command: ProxiedCommand,
  reply: ProxiedReply | undefined,
) => HookVerdict | Promise<HookVerdict>;

/** A hook in place. A fault that was to be injected and never was fails a test: look at `fired`. */
export interface InstalledHook {
  readonly fired: number;
  remove(): void;
}

/** A freeze that passed. */
export interface ProxiedFreeze {
  /** Names of the bitmaps that its transaction added, in order. */
  readonly bitmaps: readonly string[];
  /** What each of its disks held at that moment, as raw files. */
  readonly references: readonly Reference[];
}

/** A command that passed, with its answer; none when the hook or the end of the connection kept it. */
export interface CommandRecord extends ProxiedCommand {
  readonly reply: ProxiedReply | undefined;
}

export interface ProxyOptions {
  /** Where references are written. Without it freezes are recorded, but nothing is stopped or copied. */
  readonly directory?: string;
}

interface Hook {
  readonly name: string;
  readonly when: "before" | "after";
  readonly callback: CommandHook;
  fired: number;
}

/**
 * A QMP proxy that knows what the disks held at each freeze. It stands before a machine's QMP socket; when a
 * transaction with a `blockdev-backup` passes, it stops the machine, forwards the transaction, copies every disk in it with
 * `qemu-img`, lets the machine go on, and then passes the answer. The client sees nothing of that.
 * It is a plain wire for the rest: each client has a connection to QEMU of its own, so a second one waits ungreeted,
 * as it would before QEMU. Commands must end in a newline.
 */
export class QmpProxy implements AsyncDisposable {
  /** The socket that clients connect to. */
  readonly socket: string;
  readonly #target: string;
  readonly #home: string;
  readonly #server: Server;
  readonly #references: string | undefined;
  readonly #sessions = new Set<ProxySession>();
  readonly #hooks: Hook[] = [];
  readonly #commands: CommandRecord[] = [];
  readonly #freezes: ProxiedFreeze[] = [];
  readonly #occurrences = new Map<string, number>();
  #failure: Error | undefined;

  private constructor(target: string, home: string, server: Server, references: string | undefined) {
    this.#target = target;
    this.#home = home;
    this.#server = server;
    this.#references = references;
    this.socket = join(home, "qmp.sock");
  }

  /** @param target QMP socket of the machine */
  static async start(target: string, options: ProxyOptions = {}): Promise<QmpProxy> {
    if (options.directory !== undefined) await mkdir(options.directory, { recursive: true });
    const home = await mkdtemp(join(tmpdir(), "tm-proxy-"));
    const server = createServer({ allowHalfOpen: true });
    const proxy = new QmpProxy(target, home, server, options.directory);
    server.on("connection", (client) => proxy.#accept(client));
    server.listen(proxy.socket);
    await once(server, "listening");
    return proxy;
  }

  /** All freezes so far. @throws what went wrong in the proxy: nothing that it says is to be trusted then */
  get freezes(): readonly ProxiedFreeze[] {
    if (this.#failure !== undefined) throw this.#failure;
    return this.#freezes;
  }

  /** All commands so far, in the order they came. @throws as `freezes` does */
  get commands(): readonly CommandRecord[] {
    if (this.#failure !== undefined) throw this.#failure;
    return this.#commands;
  }

  /** The newest freeze one of whose bitmaps has `text` in its name: a checkpoint's id. */
  freezeOf(text: string): ProxiedFreeze {
    const found = this.freezes.findLast((freeze) => freeze.bitmaps.some((name) => name.includes(text)));
    if (found === undefined) throw new Error(`No freeze added a bitmap for ${text}`);
    return found;
  }

  /** The raw file with what the disk `source` (path of its image) held at a freeze; default the newest. */
  referenceOf(source: string, freeze = this.freezes.at(-1)): string {
    const found = freeze?.references.find((reference) => reference.source === source);
    if (found === undefined) throw new Error(`No reference of ${source} at that freeze`);
    return found.file;
  }

  /**
   * Calls `callback` whenever a command passes: to delay it, to do something at that step, or to inject a fault.
   * The command waits for it.
   *
   * @param name of the command, "*" for all
   * @param when before QEMU gets it (default), or after QEMU's answer and before the client gets that
   */
  onCommand(name: string, callback: CommandHook, when: "before" | "after" = "before"): InstalledHook {
    const hook: Hook = { name, when, callback, fired: 0 };
    this.#hooks.push(hook);
    return {
      get fired() {
        return hook.fired;
      },
      remove: () => {
        const index = this.#hooks.indexOf(hook);
        if (index >= 0) this.#hooks.splice(index, 1);
      },
    };
  }

  /** Cuts all clients off and removes the socket. References stay. Never throws. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const session of this.#sessions) session.end();
    await new Promise((resolve) => this.#server.close(resolve));
    await rm(this.#home, { recursive: true, force: true }).catch(() => undefined);
  }

  #accept(client: Socket): void {
    const session = new ProxySession(client, connect(this.#target), (line, own) => this.#pass(line, own));
    this.#sessions.add(session);
    session.ended.then(
      () => this.#sessions.delete(session),
      (error: unknown) => {
        this.#sessions.delete(session);
        this.#failure ??= error instanceof Error ? error : new Error(String(error));
      },
    );
  }

  /** Takes one line of a client to QEMU and the answer back. */
  async #pass(line: string, session: ProxySession): Promise<void> {
    // 0xFF resynchronises a monitor; a command may follow on the same line.
    const request = parseLine(line.replace(/^\xff+/, ""));
    const name = request?.["execute"];
    if (request === undefined || typeof name !== "string") {
      session.toQemu(line);
      return;
    }
    const occurrence = (this.#occurrences.get(name) ?? 0) + 1;
    this.#occurrences.set(name, occurrence);
    const given = request["arguments"];
    const command: ProxiedCommand = { name, arguments: isRecord(given) ? given : {}, occurrence };
    const record: { reply: ProxiedReply | undefined } & ProxiedCommand = { ...command, reply: undefined };
    this.#commands.push(record);

    const id = request["id"];
    const refused = await this.#ask("before", command, undefined);
    if (refused !== undefined) {
      rule(session, refused, id);
      return;
    }
    const forward = (): Promise<string> => session.exchange(line, id);
    const answer = hasBackup(command) ? await this.#freeze(command, session, forward) : await forward();
    record.reply = parseLine(answer);
    const verdict = await this.#ask("after", command, record.reply);
    if (verdict !== undefined) rule(session, verdict, id);
    else session.toClient(answer);
  }

  async #ask(
    when: "before" | "after",
    command: ProxiedCommand,
    reply: ProxiedReply | undefined,
  ): Promise<HookVerdict> {
    for (const hook of [...this.#hooks]) {
      if (hook.when !== when || (hook.name !== "*" && hook.name !== command.name)) continue;
      hook.fired += 1;
      const verdict = await hook.callback(command, reply);
      if (verdict !== undefined) return verdict;
    }
    return undefined;
  }

  async #freeze(
    command: ProxiedCommand,
    session: ProxySession,
    forward: () => Promise<string>,
  ): Promise<string> {
    const directory = this.#references;
    const index = this.#freezes.length;
    const bitmaps = addedBitmaps(command);
    if (directory === undefined) {
      const answer = await forward();
      if (isSuccess(answer)) this.#freezes.push({ bitmaps, references: [] });
      return answer;
    }
    return session.undisturbed(async () => {
      const disks = await locateDisks(backedUpDevices(command), (name) => session.execute(name));
      const { running } = await session.execute<{ running: boolean }>("query-status");
      // Also when it does not run: `stop` flushes what the block layer still caches.
      await session.execute("stop");
      try {
        const answer = await forward();
        if (isSuccess(answer)) {
          const references = await copyReferences(disks, directory, index);
          this.#freezes.push({ bitmaps, references });
        }
        return answer;
      } finally {
        if (running) await session.execute("cont");
      }
    });
  }
}

/** Gives the client what a hook wants it to get. */
function rule(session: ProxySession, verdict: Exclude<HookVerdict, undefined>, id: unknown): void {
  if (verdict === "silence") return;
  if (verdict === "disconnect") {
    session.end();
    return;
  }
  const error = { class: verdict.class ?? "GenericError", desc: verdict.error };
  session.toClient(formatLine({ ...(id === undefined ? {} : { id }), error }));
}

interface Action {
  readonly type: string;
  readonly data: Readonly<Record<string, unknown>>;
}

function actionsOf(command: ProxiedCommand, type: string): readonly Action[] {
  const actions = command.name === "transaction" ? command.arguments["actions"] : undefined;
  return Array.isArray(actions) ? (actions as Action[]).filter((action) => action.type === type) : [];
}

function hasBackup(command: ProxiedCommand): boolean {
  return backedUpDevices(command).length > 0;
}

function backedUpDevices(command: ProxiedCommand): string[] {
  return actionsOf(command, "blockdev-backup").map(({ data }) => String(data["device"]));
}

function addedBitmaps(command: ProxiedCommand): string[] {
  return actionsOf(command, "block-dirty-bitmap-add").map(({ data }) => String(data["name"]));
}

function isSuccess(answer: string): boolean {
  return parseLine(answer)?.["return"] !== undefined;
}
