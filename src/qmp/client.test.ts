import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { once } from "node:events";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { deferred } from "../flow/index.js";
import { QmpClient } from "./client.js";
import {
  QmpBusyError,
  QmpClosedError,
  QmpCommandError,
  QmpNotFoundError,
  QmpProtocolError,
} from "./errors.js";

const GREETING =
  '{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}\r\n';

let directory: string;
let server: Server | undefined;
const sockets = new Set<Socket>();

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), "qmp-test-"));
});

afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  sockets.clear();
  const closing = server;
  server = undefined;
  await new Promise<void>((resolve) => {
    if (closing === undefined) resolve();
    else closing.close(() => resolve());
  });
  await rm(directory, { recursive: true });
});

interface Request {
  readonly execute: string;
  readonly id: number;
}

/** A monitor whose words the test writes; it answers the capability negotiation itself. */
async function monitor(
  answer: (request: Request, socket: Socket) => void,
  greeting = GREETING,
): Promise<{ transport: "unix"; path: string }> {
  const path = join(directory, "qmp.sock");
  server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => socket.destroy());
    socket.write(greeting);
    createInterface({ input: socket }).on("line", (line) => {
      const request = JSON.parse(line) as Request;
      if (request.execute === "qmp_capabilities") socket.write(`{"return": {}, "id": ${request.id}}\r\n`);
      else answer(request, socket);
    });
  });
  await new Promise<void>((resolve) => server?.listen(path, resolve));
  return { transport: "unix", path };
}

async function failure(promise: Promise<unknown>): Promise<Error & { code?: string; hint?: string }> {
  return promise.then(
    () => expect.unreachable("it must fail"),
    (error: unknown) => error as Error,
  );
}

describe("QmpClient.connect()", () => {
  it("keeps what the greeting says", async () => {
    const client = await QmpClient.connect(await monitor(() => undefined));
    expect(client.greeting).toEqual({
      version: { major: 7, minor: 2, micro: 22 },
      package: "Debian",
      capabilities: ["oob"],
    });
    await client.close();
    expect(await client.closed).toBeUndefined();
  });

  it("says that the monitor is busy when no greeting comes", async () => {
    const address = await monitor(() => undefined, "");
    const error = await failure(QmpClient.connect(address, { greetingTimeoutMs: 50 }));
    expect(error).toBeInstanceOf(QmpBusyError);
    expect(error.message).toContain("another client holds this monitor");
    expect(error.hint).toContain("second monitor");
  });

  it.each([
    ["a human monitor", "QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "],
    ["an NBD server", "NBDMAGICIHAVEOPT\0\u0003"],
    ["a byte order mark", `\ufeff${GREETING}`],
    ["JSON that is no message", '{"hello": 1}\r\n'],
    ["a greeting without a version", '{"QMP": {"capabilities": []}}\r\n'],
    ["a list", "[1]\r\n"],
  ])("refuses %s", async (_what, greeting) => {
    const error = await failure(QmpClient.connect(await monitor(() => undefined, greeting)));
    expect(error).toBeInstanceOf(QmpProtocolError);
  });

  it("reads a monitor that prints JSON over many lines", async () => {
    const pretty = JSON.stringify(JSON.parse(GREETING), undefined, 4).replaceAll("\n", "\r\n") + "\r\n";
    const address = await monitor((request, socket) => {
      socket.write(`{\r\n    "return": {\r\n    },\r\n    "id": ${request.id}\r\n}\r\n`);
    }, pretty);
    const client = await QmpClient.connect(address);
    expect(await client.call("query-version")).toEqual({});
    await client.close();
  });

  it("says what is wrong when there is no socket, or something else", async () => {
    const path = join(directory, "none");
    const absent = await failure(QmpClient.connect({ transport: "unix", path }));
    expect(absent).toBeInstanceOf(QmpNotFoundError);
    expect(absent.hint).toContain("running");
    await writeFile(path, "");
    const file = await failure(QmpClient.connect({ transport: "unix", path }));
    expect(file).toBeInstanceOf(QmpNotFoundError);
    expect(file.message).toContain("no socket");
  });

  it("ends with the reason of an abort while it waits for the greeting", async () => {
    const address = await monitor(() => undefined, "");
    const reason = new Error("stop");
    const controller = new AbortController();
    const connecting = QmpClient.connect(address, { signal: controller.signal });
    server?.on("connection", () => controller.abort(reason));
    expect(await failure(connecting)).toBe(reason);
  });
});

describe("QmpClient.execute()", () => {
  it("finds each reply's command by its id when replies come out of order, with events between", async () => {
    const waiting: Request[] = [];
    const client = await QmpClient.connect(
      await monitor((request, socket) => {
        waiting.push(request);
        if (waiting.length < 3) return;
        socket.write('{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n');
        for (const { execute, id } of waiting.reverse()) {
          socket.write(`{"return": "${execute}", "id": ${id}}\r\n{"event": "RESUME"}\r\n`);
        }
      }),
    );
    const replies = await Promise.all(["a", "b", "c"].map((command) => client.call(command)));
    expect(replies).toEqual(["a", "b", "c"]);
    expect(client.pending).toBe(0);
    await client.close();
  });

  it("joins a reply that arrives in pieces, cut within a character", async () => {
    const client = await QmpClient.connect(
      await monitor((request, socket) => {
        const reply = Buffer.from(`{"return": {"name": "Gödel"}, "id": ${request.id}}\r\n`);
        const cut = reply.indexOf("ö") + 1;
        socket.write(reply.subarray(0, cut), () => socket.write(reply.subarray(cut)));
      }),
    );
    expect(await client.execute("query-name")).toBe("Gödel");
    await client.close();
  });

  it("throws QEMU's refusal and keeps the connection", async () => {
    const client = await QmpClient.connect(
      await monitor((request, socket) => {
        const body =
          request.execute === "job-cancel"
            ? '"error": {"class": "GenericError", "desc": "Job not found"}'
            : '"return": {}';
        socket.write(`{${body}, "id": ${request.id}}\r\n`);
      }),
    );
    const error = await failure(client.execute("job-cancel", { id: "j" }));
    expect(error).toBeInstanceOf(QmpCommandError);
    expect(error).toMatchObject({
      command: "job-cancel",
      class: "GenericError",
      description: "Job not found",
    });
    expect(await client.call("x")).toEqual({});
    await client.close();
  });

  it("names the field when a result is not what the schema says", async () => {
    const client = await QmpClient.connect(
      await monitor((request, socket) =>
        socket.write(`{"return": [{"id": "j", "type": "backup", "status": 1}], "id": ${request.id}}\r\n`),
      ),
    );
    const error = await failure(client.execute("query-jobs"));
    expect(error).toBeInstanceOf(QmpProtocolError);
    expect(error.message).toBe('Read reply to query-jobs: expected a string in "status", got 1');
    await client.close();
  });

  it("ends after its time and takes the late reply in silence", async () => {
    const late = deferred<Request>();
    const client = await QmpClient.connect(
      await monitor((request, socket) => {
        if (request.execute === "slow") late.resolve(request);
        else
          void late.promise.then(({ id }) =>
            socket.write(`{"return": 1, "id": ${id}}\r\n{"return": 2, "id": ${request.id}}\r\n`),
          );
      }),
    );
    const error = await failure(client.call("slow", undefined, { timeoutMs: 20 }));
    expect(error.code).toBe("TM_DEADLINE");
    expect(await client.call("next")).toBe(2);
    await client.close();
  });

  it.each([
    ["an unknown id", (request: Request) => `{"return": {}, "id": ${request.id + 7}}\r\n`],
    [
      "an id twice",
      (request: Request) => `{"return": {}, "id": 1}\r\n{"return": {}, "id": ${request.id}}\r\n`,
    ],
    ["no id", () => '{"return": {}}\r\n'],
    ["an error without id", () => '{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n'],
    ["invalid JSON", () => '{"return": \r\n'],
    ["garbage", () => "\u0001\u0002garbage\r\n"],
  ])("ends every wait when the monitor answers with %s", async (_what, answer) => {
    const client = await QmpClient.connect(await monitor((request, socket) => socket.write(answer(request))));
    using watch = client.watch(() => true);
    const [first, second, event, closed] = await Promise.all([
      failure(client.call("a")),
      failure(client.call("b")),
      failure(watch.next()),
      client.closed,
    ]);
    expect(first).toBeInstanceOf(QmpProtocolError);
    expect(second).toBe(first);
    expect(event).toBe(first);
    expect(closed).toBe(first);
    expect(await failure(client.call("c"))).toBe(first);
    expect(client.pending).toBe(0);
  });

  it("ends every wait when the monitor closes", async () => {
    const client = await QmpClient.connect(await monitor((_request, socket) => socket.end()));
    using watch = client.watch(() => true);
    const [command, event] = await Promise.all([failure(client.call("quit")), failure(watch.next())]);
    expect(command).toBeInstanceOf(QmpClosedError);
    expect(event).toBe(command);
  });
});

describe("QmpClient.adopt()", () => {
  /** A connection whose former user died: what QEMU had still to say to it, and what it hears from the new one. */
  async function abandoned(before: string, heard: string[]): Promise<{ socket: Socket; path: string }> {
    const path = join(directory, "qmp.sock");
    server = createServer((peer) => {
      sockets.add(peer);
      peer.setEncoding("latin1").on("data", (text: string) => {
        heard.push(text);
        for (const [, id] of text.matchAll(/"id":(\d+)/g)) {
          // What QEMU says to 0xFF.
          if (heard.length === 1)
            peer.write('{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n');
          peer.write(`{"return": ${heard.length}, "id": ${id}}\r\n`);
        }
      });
      peer.write(before);
    });
    await new Promise<void>((resolve) => server?.listen(path, resolve));
    const socket = connect(path);
    await once(socket, "connect");
    return { socket, path };
  }

  it.each([
    ["nothing", ""],
    ["the rest of a reply", 'me": "d0"}], "id": 17}\r\n'],
    [
      "replies to the former user, its first ids included",
      '{"return": {}, "id": 1}\r\n{"return": {}, "id": 2}\r\n',
    ],
    [
      "events, and an error without id",
      '{"event": "STOP"}\r\n{"error": {"class": "GenericError", "desc": "x"}}\r\n',
    ],
    ["half a message in pretty form", '        "x": [\r\n    }\r\n}\r\n'],
  ])("goes on after %s", async (_what, before) => {
    const heard: string[] = [];
    const { socket, path } = await abandoned(before, heard);
    const client = await QmpClient.adopt({ transport: "unix", path }, socket);
    expect(heard.join("")).toMatch(/^\xff\{"execute":"query-version"/);
    expect(await client.call("next")).toBe(heard.length);
    await client.close();
  });

  it("says that the connection is gone when it is", async () => {
    const { socket, path } = await abandoned("", []);
    for (const peer of sockets) peer.destroy();
    const error = await failure(QmpClient.adopt({ transport: "unix", path }, socket));
    expect(error).toBeInstanceOf(QmpClosedError);
  });

  it("gives up in time when QEMU does not answer", async () => {
    const { path, socket } = await abandoned("", []);
    for (const peer of sockets) peer.pause();
    const error = await failure(QmpClient.adopt({ transport: "unix", path }, socket, { timeoutMs: 20 }));
    expect(error.code).toBe("TM_DEADLINE");
  });
});

describe("QmpClient.watch()", () => {
  it("collects what comes between command and wait, and only what matches", async () => {
    const client = await QmpClient.connect(
      await monitor((request, socket) => {
        socket.write(
          '{"event": "STOP", "data": {}}\r\n{"event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}}\r\n',
        );
        socket.write(`{"return": {}, "id": ${request.id}}\r\n`);
      }),
    );
    using watch = client.watch(({ name }) => name === "BLOCK_EXPORT_DELETED");
    await client.call("x");
    expect(await watch.next()).toEqual({ name: "BLOCK_EXPORT_DELETED", data: { id: "e" } });
    expect((await failure(watch.next({ timeoutMs: 20 }))).message).toContain("no answer within");
    await client.close();
  });

  it("loses no event to a wait that ended before it came", async () => {
    const client = await QmpClient.connect(
      await monitor((request, socket) =>
        socket.write(`{"event": "STOP"}\r\n{"return": {}, "id": ${request.id}}\r\n`),
      ),
    );
    using watch = client.watch(() => true);
    await failure(watch.next({ timeoutMs: 5 }));
    await client.call("x");
    expect((await watch.next({ timeoutMs: 1000 })).name).toBe("STOP");
    await client.close();
  });
});
