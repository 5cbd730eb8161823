import { describe, expect, it } from "vitest";
import { NotFoundError, UsageError } from "../../src/errors/index.js";
import {
  connect,
  listExports,
  negotiate,
  NbdConnectionError,
  NbdProtocolError,
  openSocket,
} from "../../src/nbd/index.js";
import { FakeNbdServer, type FakeExport, type Script } from "../support/fake-nbd-server.js";
import { greeting, OPT, optionReply, REP } from "../support/nbd-frames.js";
import { temporaryDirectory } from "../support/temporary.js";

/** Connects to a server with this script; returns what came of it, once the script has seen the client close. */
async function outcomeOf(
  script: Script,
  contexts: readonly string[] = ["base:allocation"],
): Promise<unknown> {
  await using server = await FakeNbdServer.start(async (peer) => {
    await script(peer);
    await peer.untilClosed();
  });
  const [result] = await Promise.allSettled([
    connect(server.address, { exportName: "sda", contexts, timeoutMs: 500 }),
  ]);
  if (result.status === "fulfilled") result.value.destroy();
  await server.played();
  return result.status === "rejected" ? result.reason : undefined;
}

/** Honest until an option comes, then the given bytes. */
function answering(option: number, ...replies: readonly Buffer[]): Script {
  return async (peer) => {
    await peer.handshake({}, option);
    peer.send(...replies);
  };
}

const exported = (offer: FakeExport): Script => {
  return async (peer) => {
    await peer.handshake(offer);
  };
};
const context = (id: number, name: string) =>
  optionReply(OPT.SET_META_CONTEXT, REP.META_CONTEXT, [32, id], name);
const ack = (option: number) => optionReply(option, REP.ACK);

const LIES: readonly [title: string, code: string, script: Script][] = [
  ["a greeting of another protocol", "TM_NBD_GREETING_MAGIC", (peer) => peer.send("SSH-2.0-OpenSSH_9.2\r\n")],
  [
    "a greeting without IHAVEOPT",
    "TM_NBD_GREETING_MAGIC",
    (peer) => peer.send("NBDMAGIC", "IHAVEOPX", [16, 3]),
  ],
  [
    "the oldstyle greeting",
    "TM_NBD_OLDSTYLE",
    (peer) => peer.send("NBDMAGIC", [64, 0x00420281861253n], [64, 1024], [32, 1], Buffer.alloc(124)),
  ],
  ["a greeting without fixed newstyle", "TM_NBD_OLDSTYLE", (peer) => peer.send(greeting(2))],
  [
    "an option reply with bad magic",
    "TM_NBD_OPTION_MAGIC",
    answering(OPT.STRUCTURED_REPLY, Buffer.alloc(20, 0x55)),
  ],
  ["a reply to another option", "TM_NBD_OPTION_ORDER", answering(OPT.STRUCTURED_REPLY, ack(OPT.GO))],
  [
    "replies to two options in the wrong order",
    "TM_NBD_OPTION_ORDER",
    answering(OPT.SET_META_CONTEXT, ack(OPT.GO), ack(OPT.SET_META_CONTEXT)),
  ],
  [
    "an option reply of 4 GiB",
    "TM_NBD_OPTION_LENGTH",
    async (peer) => {
      await peer.handshake({}, OPT.GO);
      peer.send([64, 0x3e889045565a9n], [32, OPT.GO], [32, REP.INFO], [32, 0xffffffff]);
    },
  ],
  [
    "an acknowledgement with data",
    "TM_NBD_OPTION_REPLY",
    answering(OPT.STRUCTURED_REPLY, optionReply(OPT.STRUCTURED_REPLY, REP.ACK, "?")),
  ],
  [
    "a reply of the wrong kind",
    "TM_NBD_OPTION_REPLY",
    answering(OPT.GO, optionReply(OPT.GO, REP.SERVER, [32, 0])),
  ],
  [
    "information shorter than it must be",
    "TM_NBD_OPTION_REPLY",
    answering(OPT.GO, optionReply(OPT.GO, REP.INFO, [16, 0], [32, 1])),
  ],
  ["no size of the export", "TM_NBD_OPTION_REPLY", answering(OPT.GO, ack(OPT.GO))],
  [
    "more contexts than asked for",
    "TM_NBD_UNASKED_CONTEXT",
    answering(OPT.SET_META_CONTEXT, context(0, "base:allocation"), context(1, "qemu:allocation-depth")),
  ],
  [
    "the same context twice",
    "TM_NBD_UNASKED_CONTEXT",
    answering(OPT.SET_META_CONTEXT, context(0, "base:allocation"), context(1, "base:allocation")),
  ],
  ["an export of 2^63 bytes", "TM_NBD_EXPORT_SIZE", exported({ size: 2n ** 63n })],
  ["an export of 2^64 - 1 bytes", "TM_NBD_EXPORT_SIZE", exported({ size: 2n ** 64n - 1n })],
  ["a minimum block size of 0", "TM_NBD_BLOCK_SIZE", exported({ blockSize: [0, 4096, 65536] })],
  ["a minimum block size of 1000", "TM_NBD_BLOCK_SIZE", exported({ blockSize: [1000, 4096, 65536] })],
  ["a preferred block size of 5000", "TM_NBD_BLOCK_SIZE", exported({ blockSize: [512, 5000, 65536] })],
  ["a maximum below the minimum", "TM_NBD_BLOCK_SIZE", exported({ blockSize: [4096, 4096, 512] })],
  ["transmission flags without HAS_FLAGS", "TM_NBD_EXPORT_FLAGS", exported({ flags: 2 })],
];

describe("negotiate() ends with its own error and closes the connection when the server sends", () => {
  it.each(LIES)("%s: %s", { timeout: 5000 }, async (_title, code, script) => {
    const error = await outcomeOf(script);
    expect(error).toBeInstanceOf(NbdProtocolError);
    expect(error).toMatchObject({ code, message: expect.stringContaining('"sda"') as string });
  });

  it("one id for two contexts: TM_NBD_CONTEXT_ID", { timeout: 5000 }, async () => {
    const script = answering(OPT.SET_META_CONTEXT, context(3, "base:allocation"), context(3, "x:y"));
    expect(await outcomeOf(script, ["base:allocation", "x:y"])).toMatchObject({ code: "TM_NBD_CONTEXT_ID" });
  });

  it("replies without end: TM_NBD_OPTION_COUNT", { timeout: 5000 }, async () => {
    const error = await outcomeOf(async (peer) => {
      await peer.handshake({}, OPT.GO);
      for (let count = 0; count < 300; count += 1) peer.send(optionReply(OPT.GO, REP.INFO, [16, 9]));
    });
    expect(error).toBeInstanceOf(NbdProtocolError);
    expect(error).toMatchObject({ code: "TM_NBD_OPTION_COUNT" });
  });
});

describe("negotiate() ends with its own error and closes the connection when", () => {
  const cases: readonly [title: string, code: string, script: Script][] = [
    ["the server says nothing", "TM_NBD_TIMEOUT", () => undefined],
    ["the server greets and says no more", "TM_NBD_TIMEOUT", (peer) => peer.greet()],
    [
      "the server closes in its greeting",
      "TM_NBD_EOF_HANDSHAKE",
      (peer) => {
        peer.send("NBDM");
        peer.close();
      },
    ],
    [
      "the server closes in an option reply",
      "TM_NBD_EOF_HANDSHAKE",
      async (peer) => {
        await peer.handshake({}, OPT.GO);
        peer.send(optionReply(OPT.GO, REP.INFO, [16, 0], [64, 1], [16, 1]).subarray(0, 25));
        peer.close();
      },
    ],
    [
      "the server lacks NBD_OPT_GO",
      "TM_NBD_REFUSED",
      answering(OPT.GO, optionReply(OPT.GO, REP.ERR_UNSUP, "too old")),
    ],
    [
      "the server wants TLS",
      "TM_NBD_REFUSED",
      answering(OPT.STRUCTURED_REPLY, optionReply(OPT.STRUCTURED_REPLY, REP.ERR_TLS_REQD)),
    ],
  ];
  it.each(cases)("%s: %s", { timeout: 5000 }, async (_title, code, script) => {
    const error = await outcomeOf(script);
    expect(error).toBeInstanceOf(NbdConnectionError);
    expect(error).toMatchObject({ code, message: expect.stringContaining('"sda"') as string });
  });

  it("the export does not exist: NotFoundError with the server's words, made printable", async () => {
    const refusal = optionReply(OPT.GO, REP.ERR_UNKNOWN, "no \u001b[31msuch\n thing");
    const error = await outcomeOf(answering(OPT.GO, refusal));
    expect(error).toBeInstanceOf(NotFoundError);
    expect(error).toMatchObject({ code: "TM_NBD_NO_EXPORT" });
    expect((error as Error).message).toContain("NBD_REP_ERR_UNKNOWN (no ?[31msuch? thing)");
  });

  it("the signal aborts: rejects with its reason", { timeout: 5000 }, async () => {
    const controller = new AbortController();
    const reason = new Error("enough");
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.greet();
      controller.abort(reason);
      await peer.untilClosed();
    });
    const attempt = connect(server.address, { exportName: "sda", signal: controller.signal });
    await expect(attempt).rejects.toBe(reason);
    await server.played();
  });

  it("requestSize is out of its bounds: UsageError, the socket is closed", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.untilClosed();
    });
    for (const requestSize of [4096, 2 << 20, Number.NaN]) {
      const socket = await openSocket(server.address);
      await expect(negotiate(socket, { exportName: "sda", requestSize })).rejects.toThrow(UsageError);
      expect(socket.fd).toBeUndefined();
    }
    await server.played();
  });
});

describe("a refusal in the handshake", () => {
  it("is answered with NBD_OPT_ABORT before closing", { timeout: 5000 }, async () => {
    let last = Buffer.alloc(0);
    await outcomeOf(async (peer) => {
      await peer.handshake({}, OPT.GO);
      peer.send(optionReply(OPT.GO, REP.ERR_POLICY));
      last = Buffer.from(await peer.take(16));
    });
    expect(last.toString("hex")).toBe("49484156454f5054" + "00000002" + "00000000");
  });
});

describe("openSocket()", () => {
  it("sends nothing, keeps an early greeting, and gives a descriptor", { timeout: 5000 }, async () => {
    let waiting: () => number = () => -1;
    let greeted: () => void = () => undefined;
    const greetingSent = new Promise<void>((resolve) => (greeted = resolve));
    await using server = await FakeNbdServer.start(async (peer) => {
      peer.send(greeting());
      waiting = () => peer.waiting;
      greeted();
      await peer.take(4);
      for (let option = 0; option !== OPT.GO;) {
        ({ option } = await peer.option());
        if (option === OPT.GO) peer.send(optionReply(option, REP.INFO, [16, 0], [64, 77], [16, 3]));
        peer.send(ack(option));
      }
      await peer.untilClosed();
    });
    const socket = await openSocket(server.address);
    await greetingSent;
    // A round trip on another connection: the greeting of this one has been read when it is done.
    await using other = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      await peer.untilClosed();
    });
    await (await connect(other.address)).close();
    expect(waiting()).toBe(0);
    expect(socket.fd).toBeGreaterThan(2);
    const client = await negotiate(socket, { exportName: "sda" });
    expect(client.export.size).toBe(77);
    await client.close();
    expect(socket.fd).toBeUndefined();
    await server.played();
  });

  it("says when nobody listens: TM_NBD_CONNECT with the address", async () => {
    await using directory = await temporaryDirectory();
    const path = directory.file("none");
    await expect(openSocket({ transport: "unix", path })).rejects.toMatchObject({
      code: "TM_NBD_CONNECT",
      message: expect.stringContaining(`unix:${path}: connect ENOENT`) as string,
    });
    await expect(openSocket({ transport: "tcp", host: "localhost", port: 1 })).rejects.toMatchObject({
      code: "TM_NBD_CONNECT",
      message: expect.stringMatching(/tcp:localhost:1: connect ECONNREFUSED/) as string,
    });
  });

  it("refuses a path that the kernel would cut off", async () => {
    const path = `/tmp/${"x".repeat(108)}`;
    await expect(openSocket({ transport: "unix", path })).rejects.toThrow(UsageError);
  });

  it(
    "refuses a server that talks without end before it is asked: TM_NBD_FLOOD",
    { timeout: 5000 },
    async () => {
      await using server = await FakeNbdServer.start(async (peer) => {
        peer.send(Buffer.alloc(100_000));
        await peer.untilClosed();
      });
      const socket = await openSocket(server.address);
      await server.played();
      await expect(negotiate(socket, { exportName: "sda" })).rejects.toMatchObject({ code: "TM_NBD_FLOOD" });
    },
  );
});

describe("listExports()", () => {
  it("reads a long list, and refuses one without end: TM_NBD_OPTION_COUNT", { timeout: 15_000 }, async () => {
    const serve = (count: number): Script => {
      return async (peer) => {
        await peer.greet();
        const { option } = await peer.option();
        const entry = optionReply(option, REP.SERVER, [32, 4], "disk");
        peer.send(Buffer.concat(Array<Buffer>(count).fill(entry)), ack(option));
        await peer.untilClosed();
      };
    };
    await using long = await FakeNbdServer.start(serve(5000));
    expect(await listExports(long.address)).toHaveLength(5000);
    await using endless = await FakeNbdServer.start(serve(70_000));
    await expect(listExports(endless.address)).rejects.toMatchObject({ code: "TM_NBD_OPTION_COUNT" });
    await Promise.all([long.played(), endless.played()]);
  });

  it("refuses a name that is longer than its reply", { timeout: 5000 }, async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.greet();
      const { option } = await peer.option();
      peer.send(optionReply(option, REP.SERVER, [32, 100], "short"));
      await peer.untilClosed();
    });
    await expect(listExports(server.address)).rejects.toMatchObject({ code: "TM_NBD_OPTION_REPLY" });
    await server.played();
  });

  it("says when the server does not tell: TM_NBD_REFUSED", { timeout: 5000 }, async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.greet();
      const { option } = await peer.option();
      peer.send(optionReply(option, REP.ERR_POLICY, "not you"));
      await peer.untilClosed();
    });
    await expect(listExports(server.address)).rejects.toMatchObject({
      code: "TM_NBD_REFUSED",
      message: expect.stringContaining("NBD_REP_ERR_POLICY (not you)") as string,
    });
    await server.played();
  });
});
