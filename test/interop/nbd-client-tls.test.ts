import { readFile, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { MiB } from "../../src/bytes/index.js";
import {
  BASE_ALLOCATION,
  connect,
  formatNbdUri,
  listExports,
  tlsOptionsOf,
  type NbdUri,
  type TlsOptions,
} from "../../src/nbd/index.js";
import { writeNoise } from "../support/image.js";
import { CertificateAuthority } from "../support/nbd-certificates.js";
import { startNbdkit, startQemuNbd, type RealNbdServer, type ServerPlace } from "../support/nbd-servers.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const SIZE = 4 * MiB + 512;
const KEY = "d7f3a1c0e4b2968857463528190a0b0c";
const WRONG_KEY = "00f3a1c0e4b2968857463528190a0b0c";
let directory: TemporaryDirectory;
let image: string;
let authority: CertificateAuthority;
let stranger: CertificateAuthority;

beforeAll(async () => {
  directory = await temporaryDirectory("tm-tls-");
  image = await writeNoise(directory.file("disk.raw"), SIZE, 3);
  authority = await CertificateAuthority.create(directory.file("ca"));
  stranger = await CertificateAuthority.create(directory.file("stranger"));
  const names = ["DNS:localhost", "DNS:disks.example", "IP:127.0.0.1"];
  await authority.issue(directory.file("server"), "server", { names });
  await authority.issue(directory.file("server-elsewhere"), "server", { names: ["DNS:elsewhere.example"] });
  await authority.issue(directory.file("server-expired"), "server", { names, days: -1 });
  await authority.issue(directory.file("client"), "client");
  await authority.issue(directory.file("client-expired"), "client", { days: -1 });
  await stranger.issue(directory.file("client-of-stranger"), "client", { trust: authority });
  await authority.trustIn(directory.file("client-without"));
  await stranger.trustIn(directory.file("client-wrong-ca"));
  // qemu-nbd wants its keys in a directory under this name, nbdkit as a file.
  await run("mkdir", [directory.file("psk")]);
  await writeFile(directory.file("psk/keys.psk"), `bob:${WRONG_KEY}\nalice:${KEY}\n`);
  await writeFile(directory.file("ours.psk"), `alice:${KEY}\nmallory:${KEY}\n`);
  await writeFile(directory.file("wrong.psk"), `alice:${WRONG_KEY}\n`);
});

afterAll(() => directory[Symbol.asyncDispose]());

type Kind = "x509" | "psk";
interface Place extends ServerPlace {
  /** Directory of the server's certificates; default "server". */
  readonly certificates?: string;
}

const SERVERS = {
  "qemu-nbd": (kind: Kind, place: Place) => {
    const dir = directory.file(kind === "psk" ? "psk" : (place.certificates ?? "server"));
    const verify = kind === "psk" ? "" : ",verify-peer=on";
    return startQemuNbd({
      ...{ ...place, image, format: "raw", exportName: "sda" },
      extra: ["--object", `tls-creds-${kind},id=t,endpoint=server,dir=${dir}${verify}`, "--tls-creds=t"],
    });
  },
  nbdkit: (kind: Kind, place: Place) => {
    const credentials =
      kind === "psk"
        ? [`--tls-psk=${directory.file("psk/keys.psk")}`]
        : [`--tls-certificates=${directory.file(place.certificates ?? "server")}`, "--tls-verify-peer"];
    return startNbdkit({
      ...place,
      parameters: ["--tls=require", ...credentials, "--exportname=sda", "file", image],
    });
  },
} as const;
const NAMES = ["qemu-nbd", "nbdkit"] as const;
type Name = (typeof NAMES)[number];

/** The URI of a server's export with TLS. */
function secure(server: RealNbdServer, parameters: Readonly<Record<string, string>>, user?: string): NbdUri {
  const username = user === undefined ? {} : { username: user };
  return { address: server.address, exportName: "sda", tls: true, ...username, parameters };
}

const certificates = (name: string, hostname?: string): Record<string, string> => ({
  "tls-certificates": directory.file(name),
  ...(hostname === undefined ? {} : { "tls-hostname": hostname }),
});

const x509Cases = NAMES.flatMap((name) =>
  (["unix", "tcp"] as const).map((transport) => ({ name, transport })),
);

describe("connect() with TLS reads the disk", () => {
  it.each(x509Cases)("by certificates from $name over $transport", async ({ name, transport }) => {
    await using server = await SERVERS[name]("x509", { transport });
    // A unix socket has no name of its own; 127.0.0.1 stands in the certificate.
    const uri = secure(server, certificates("client", transport === "unix" ? "disks.example" : undefined));
    const client = await connect(uri, { contexts: [BASE_ALLOCATION] });
    expect(client.export).toMatchObject({ name: "sda", size: SIZE, contexts: [BASE_ALLOCATION] });
    const target = Buffer.alloc(SIZE);
    await client.read(0, target);
    expect(target.equals(await readFile(image))).toBe(true);
    await client.close();
    expect(await client.closed).toBeUndefined();
    const listed = await listExports(server.address, { tls: tlsOptionsOf(uri) });
    // nbdkit lists its default export, whatever it is called.
    expect(listed.map((entry) => entry.name)).toEqual([name === "nbdkit" ? "" : "sda"]);
    // The same URI means the same to libnbd, which is the judge of what we take for one.
    const { stdout } = await run("nbdinfo", ["--size", formatNbdUri(uri)]);
    expect(Number(stdout)).toBe(SIZE);
  });

  it.each(x509Cases)("by a shared key from $name over $transport", async ({ name, transport }) => {
    await using server = await SERVERS[name]("psk", { transport });
    const key = { "tls-psk-file": directory.file("ours.psk") };
    for (const uri of [secure(server, key, "alice"), secure(server, { ...key, "tls-username": "alice" })]) {
      const client = await connect(uri);
      const target = Buffer.alloc(SIZE);
      await client.read(0, target);
      expect(target.equals(await readFile(image))).toBe(true);
      await client.close();
    }
    const uri = formatNbdUri(secure(server, key, "alice"));
    expect(Number((await run("nbdinfo", ["--size", uri])).stdout)).toBe(SIZE);
  });

  it("writes it too, many requests at once", async () => {
    const target = directory.file("target.raw");
    await writeFile(target, Buffer.alloc(SIZE));
    const noise = await readFile(image);
    {
      await using server = await startQemuNbd({
        ...{ image: target, format: "raw", exportName: "sda", writable: true, transport: "tcp" },
        extra: [
          ...[
            "--object",
            `tls-creds-x509,id=t,endpoint=server,dir=${directory.file("server")},verify-peer=on`,
          ],
          "--tls-creds=t",
        ],
      });
      const client = await connect(secure(server, certificates("client")));
      await client.write(0, noise);
      await client.flush();
      await client.close();
    }
    expect((await readFile(target)).equals(noise)).toBe(true);
  });

  it("without a name to check, when told so: tls-verify-peer=0", async () => {
    await using server = await SERVERS["qemu-nbd"]("x509", { certificates: "server-elsewhere" });
    const client = await connect(secure(server, { ...certificates("client"), "tls-verify-peer": "0" }));
    expect(client.export.size).toBe(SIZE);
    await client.close();
  });
});

/** How one attempt ends; it must within 5 seconds. */
async function errorOf(uri: NbdUri): Promise<unknown> {
  const [outcome] = await Promise.allSettled([connect(uri)]);
  if (outcome.status === "fulfilled") await outcome.value.close();
  return outcome.status === "rejected" ? outcome.reason : undefined;
}

interface Failure {
  readonly title: string;
  readonly code: string;
  readonly kind: Kind;
  readonly server?: string;
  readonly parameters: () => Record<string, string>;
  readonly user?: string;
  readonly says: RegExp;
}

const FAILURES: readonly Failure[] = [
  {
    ...{ title: "the server's authority is not ours", kind: "x509", code: "TM_NBD_TLS_UNTRUSTED" },
    parameters: () => certificates("client-wrong-ca"),
    says: /server's certificate is not trusted/,
  },
  {
    ...{ title: "the certificate bears another name", kind: "x509", code: "TM_NBD_TLS_NAME" },
    server: "server-elsewhere",
    parameters: () => certificates("client"),
    says: /certificate is another server's: .*127\.0\.0\.1/,
  },
  {
    ...{ title: "it does not bear the name that was given", kind: "x509", code: "TM_NBD_TLS_NAME" },
    parameters: () => certificates("client", "other.example"),
    says: /other\.example/,
  },
  {
    ...{ title: "the server's certificate has expired", kind: "x509", code: "TM_NBD_TLS_EXPIRED" },
    server: "server-expired",
    parameters: () => certificates("client"),
    says: /not valid today/,
  },
  {
    ...{ title: "a client certificate is missing", kind: "x509", code: "TM_NBD_TLS_CLIENT_CERTIFICATE" },
    parameters: () => certificates("client-without"),
    says: /server seems to want a client certificate, and there is none/,
  },
  {
    ...{ title: "ours is signed by a stranger", kind: "x509", code: "TM_NBD_TLS_CLIENT_CERTIFICATE" },
    parameters: () => certificates("client-of-stranger"),
    says: /another than client certificate .*client-of-stranger\/client-cert\.pem/,
  },
  {
    ...{ title: "our certificate has expired", kind: "x509", code: "TM_NBD_TLS_CLIENT_EXPIRED" },
    parameters: () => certificates("client-expired"),
    says: /client-expired\/client-cert\.pem expired at 20/,
  },
  {
    ...{ title: "the key is another one", kind: "psk", code: "TM_NBD_TLS_PSK", user: "alice" },
    parameters: () => ({ "tls-psk-file": directory.file("wrong.psk") }),
    says: /do not share a key/,
  },
  {
    ...{ title: "the server does not know the user", kind: "psk", code: "TM_NBD_TLS_PSK", user: "mallory" },
    parameters: () => ({ "tls-psk-file": directory.file("ours.psk") }),
    says: /user "mallory" do not share a key/,
  },
  {
    ...{
      title: "a key meets a server with certificates",
      kind: "x509",
      code: "TM_NBD_TLS_PSK",
      user: "alice",
    },
    parameters: () => ({ "tls-psk-file": directory.file("ours.psk") }),
    says: /do not share a key/,
  },
  {
    ...{ title: "certificates meet a server with keys", kind: "psk", code: "TM_NBD_TLS" },
    parameters: () => certificates("client"),
    says: /server ended the handshake of TLS/,
  },
];
const failuresOn = NAMES.flatMap((name) => FAILURES.map((failure) => ({ name, ...failure })));

/** qemu-nbd reads its certificates when it starts and refuses those that have expired. */
const canServe = ({ name, server }: { name: Name; server?: string }): boolean =>
  !(name === "qemu-nbd" && server === "server-expired");

describe("connect() with TLS fails in its own words when", () => {
  it.each(failuresOn.filter(canServe))(
    "$title ($name): $code",
    { timeout: 15_000 },
    async ({ name, kind, server: serverFiles, parameters, user, code, says }) => {
      const place = serverFiles === undefined ? {} : { certificates: serverFiles };
      await using server = await SERVERS[name](kind, { transport: "tcp", ...place });
      const began = performance.now();
      const error = await errorOf(secure(server, parameters(), user));
      expect(performance.now() - began).toBeLessThan(5000);
      expect(error).toMatchObject({ code, message: expect.stringMatching(says) as string });
      expect((error as Error).message).toMatch(/^Cannot negotiate export "sda" with tcp:127\.0\.0\.1:\d+: /);
      // The server is there for others.
      const good = kind === "psk" ? { "tls-psk-file": directory.file("ours.psk") } : certificates("client");
      if (serverFiles === undefined) expect(await errorOf(secure(server, good, "alice"))).toBeUndefined();
    },
  );

  it("a server shows a certificate that all the world trusts, and not the shared key", async () => {
    await using server = await startNbdkit({
      transport: "tcp",
      parameters: ["--tls=require", `--tls-certificates=${directory.file("server")}`, "file", image],
    });
    // Node reads the list of those it trusts when it starts: another process, which trusts our authority.
    const attempt = async (tls: TlsOptions): Promise<string> => {
      const library = new URL("../../dist/nbd/index.js", import.meta.url).href;
      const program = `
        const { connect } = await import(${JSON.stringify(library)});
        await connect(${JSON.stringify(server.address)}, { tls: ${JSON.stringify(tls)} }).then(
          (client) => client.close().then(() => console.log("connected")),
          (error) => console.log(error.code),
        );`;
      const env = { NODE_EXTRA_CA_CERTS: directory.file("ca/cert.pem"), HOME: directory.path };
      const node = await run(process.execPath, ["--input-type=module", "--eval", program], { env });
      return node.stdout.trim();
    };
    // No directory of ours is named: it is Node's list that decides, and the server is on it.
    expect(await attempt({ type: "x509" })).toBe("connected");
    const psk = { type: "psk", pskFile: directory.file("ours.psk"), username: "alice" } as const;
    expect(await attempt(psk)).toBe("TM_NBD_TLS_PSK");
  });

  it.each(NAMES)("%s has no TLS: TM_NBD_TLS_REFUSED, and nothing was said in plain text", async (name) => {
    await using server =
      name === "nbdkit"
        ? await startNbdkit({ parameters: ["--tls=off", "file", image] })
        : await startQemuNbd({ image, format: "raw", exportName: "sda" });
    expect(await errorOf(secure(server, certificates("client", "localhost")))).toMatchObject({
      code: "TM_NBD_TLS_REFUSED",
      message: expect.stringContaining("server refuses TLS: NBD_REP_ERR_") as string,
    });
  });

  it.each(NAMES)("%s speaks TLS only and we do not: TM_NBD_REFUSED with what to do", async (name) => {
    await using server = await SERVERS[name]("x509", {});
    await expect(connect(server.address, { exportName: "sda" })).rejects.toMatchObject({
      code: "TM_NBD_REFUSED",
      message: expect.stringContaining("NBD_REP_ERR_TLS_REQD") as string,
      hint: "The server speaks TLS only: use nbds:// or nbds+unix://",
    });
  });
});
