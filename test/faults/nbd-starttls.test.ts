import { writeFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { UsageError } from "../../src/errors/index.js";
import { connect, listExports, NbdConnectionError, type TlsOptions } from "../../src/nbd/index.js";
import { FakeNbdServer, type Script } from "../support/fake-nbd-server.js";
import { frame, greeting, OPT, optionReply, REP } from "../support/nbd-frames.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";

let directory: TemporaryDirectory;
let psk: TlsOptions;

beforeAll(async () => {
  directory = await temporaryDirectory("tm-tls-");
  const pskFile = directory.file("keys.psk");
  await writeFile(pskFile, "alice:00112233445566778899aabbccddeeff\nbob:not hexadecimal\n");
  psk = { type: "psk", pskFile, username: "alice" };
});

afterAll(() => directory[Symbol.asyncDispose]());

/** Connects with TLS; what came of it, and what the client said behind NBD_OPT_STARTTLS. */
async function attempt(script: Script): Promise<{ error: unknown; said: Buffer }> {
  let said = Buffer.alloc(0);
  await using server = await FakeNbdServer.start(async (peer) => {
    await peer.greet();
    expect(await peer.option()).toEqual({ option: OPT.STARTTLS, data: Buffer.alloc(0) });
    await script(peer);
    said = Buffer.from(await peer.untilClosed());
  });
  const [outcome] = await Promise.allSettled([
    connect(server.address, { exportName: "secret-disk", tls: psk, timeoutMs: 700 }),
  ]);
  if (outcome.status === "fulfilled") outcome.value.destroy();
  await server.played();
  return { error: outcome.status === "rejected" ? outcome.reason : undefined, said };
}

const answer = (type: number): Buffer => optionReply(OPT.STARTTLS, type);
const ABORT = frame("IHAVEOPT", [32, OPT.ABORT], [32, 0]);
/** First byte of a TLS record that carries a handshake. */
const TLS_HANDSHAKE = 0x16;

describe("connect() with TLS", { timeout: 5000 }, () => {
  it.each([
    ["NBD_REP_ERR_UNSUP", REP.ERR_UNSUP],
    ["NBD_REP_ERR_POLICY", REP.ERR_POLICY],
  ])("says goodbye and nothing else to a server that answers %s", async (name, type) => {
    const { error, said } = await attempt((peer) => peer.send(answer(type)));
    expect(error).toBeInstanceOf(NbdConnectionError);
    expect(error).toMatchObject({
      code: "TM_NBD_TLS_REFUSED",
      message: expect.stringContaining(`server refuses TLS: ${name}`) as string,
    });
    expect(said.equals(ABORT)).toBe(true);
  });

  it("refuses plain text that follows the consent: TM_NBD_TLS_EARLY", async () => {
    // What a forger would want to be taken for the answer to the first option inside TLS.
    const forged = optionReply(OPT.EXTENDED_HEADERS, REP.ERR_UNSUP);
    const { error, said } = await attempt((peer) => peer.send(answer(REP.ACK), forged));
    expect(error).toMatchObject({ code: "TM_NBD_TLS_EARLY" });
    expect(said).toHaveLength(0);
  });

  it.each<[title: string, code: string, script: Script]>([
    [
      "plain text in answer to the handshake of TLS",
      "TM_NBD_TLS_PSK",
      async (peer) => {
        peer.send(answer(REP.ACK));
        await peer.take(5);
        peer.send(optionReply(OPT.EXTENDED_HEADERS, REP.ERR_UNSUP));
      },
    ],
    [
      "the end of the connection in answer to it",
      "TM_NBD_TLS_PSK",
      async (peer) => {
        peer.send(answer(REP.ACK));
        await peer.take(5);
        peer.close();
      },
    ],
    ["silence", "TM_NBD_TIMEOUT", (peer) => peer.send(answer(REP.ACK))],
    ["no answer to the option", "TM_NBD_TIMEOUT", () => undefined],
  ])("ends by %s: %s, and never speaks of the export in plain text", async (_title, code, script) => {
    const { error, said } = await attempt(script);
    expect(error).toMatchObject({ code, message: expect.stringContaining('"secret-disk"') as string });
    expect(said.includes("secret-disk")).toBe(false);
    if (said.length > 5) expect(said.includes("IHAVEOPT")).toBe(false);
  });

  it("begins the handshake of TLS at once when the server consents", async () => {
    let first = -1;
    await attempt(async (peer) => {
      peer.send(answer(REP.ACK));
      [first = -1] = await peer.take(5);
    });
    expect(first).toBe(TLS_HANDSHAKE);
  });

  it.each<[what: string, tls: (file: (name: string) => string) => TlsOptions, why: string]>([
    [
      "a key file that is not there",
      (file) => ({ type: "psk", pskFile: file("none") }),
      "none does not exist",
    ],
    [
      "a user without a key",
      (file) => ({ type: "psk", pskFile: file("keys.psk"), username: "carol" }),
      'no key of user "carol"',
    ],
    [
      "a key that is none",
      (file) => ({ type: "psk", pskFile: file("keys.psk"), username: "bob" }),
      "is not hexadecimal",
    ],
    [
      "a directory without an authority",
      (file) => ({ type: "x509", certificates: file("."), hostname: "h" }),
      "ca-cert.pem does not exist",
    ],
    [
      "a unix socket without a name to check",
      (file) => ({ type: "x509", certificates: file(".") }),
      "has no name that its server's certificate must bear",
    ],
  ])("refuses %s before it says anything", async (_what, tls, why) => {
    await using server = await FakeNbdServer.start(async (peer) => {
      peer.send(greeting());
      expect(await peer.untilClosed()).toHaveLength(0);
    });
    const options = { tls: tls((name) => directory.file(name)) };
    await expect(connect(server.address, options)).rejects.toThrow(UsageError);
    await expect(connect(server.address, options)).rejects.toThrow(why);
    await expect(listExports(server.address, options)).rejects.toThrow(why);
    await server.played();
  });
});
