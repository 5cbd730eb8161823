import { X509Certificate } from "node:crypto";
import { readFile } from "node:fs/promises";
import { isIP } from "node:net";
import { userInfo } from "node:os";
import { join } from "node:path";
import { checkServerIdentity, createSecureContext, type ConnectionOptions } from "node:tls";
import { messageOf, UsageError } from "../errors/index.js";
import type { NbdAddress } from "./address.js";
import { NbdConnectionError } from "./errors.js";
import {
  defaultCertificateDirectories,
  type PskOptions,
  type TlsOptions,
  type X509Options,
} from "./tls-options.js";

/** What was read from files for one connection. */
export interface TlsCredentials {
  /** For `tls.connect`. */
  readonly connection: ConnectionOptions;
  /** Who we are, for messages: `user "alice"`, `client certificate /etc/pki/libnbd/client-cert.pem`. */
  readonly identity: string | undefined;
}

/**
 * PSK with forward secrecy, and never without encryption (OpenSSL's list "PSK" has such ciphers). A key of a file is
 * for SHA-256: the two TLS 1.3 suites are those with that hash.
 */
const PSK_CIPHERS =
  "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:kECDHEPSK+HIGH:kDHEPSK+HIGH:!eNULL:!aNULL";

/**
 * Reads certificates or key.
 *
 * @param what for messages: `Cannot negotiate export "sda" with unix:/run/vm.sock`
 * @throws {UsageError} when a file is missing or not what it should be, or there is no name to hold the server to
 * @throws {NbdConnectionError} TM_NBD_TLS_CLIENT_EXPIRED when our own certificate is not valid today
 */
export async function loadCredentials(
  what: string,
  address: NbdAddress,
  options: TlsOptions,
): Promise<TlsCredentials> {
  return options.type === "psk" ? loadKey(what, options) : loadCertificates(what, address, options);
}

async function loadKey(what: string, options: PskOptions): Promise<TlsCredentials> {
  const { pskFile, username = userInfo().username } = options;
  const lines = (await readNamed(what, pskFile)).split(/\r?\n/);
  const line = lines.find((text) => text.startsWith(`${username}:`));
  const who = `user ${JSON.stringify(username)}`;
  if (line === undefined) {
    throw new UsageError(`${what}: ${pskFile} has no key of ${who}`, {
      hint: "Name the user in the URI: nbds://USER@HOST/, or tls-username=USER",
    });
  }
  const text = line.slice(username.length + 1).trim();
  if (!/^([0-9a-f]{2})+$/i.test(text)) {
    throw new UsageError(`${what}: the key of ${who} in ${pskFile} is not hexadecimal`);
  }
  const psk = Buffer.from(text, "hex");
  const connection: ConnectionOptions = {
    pskCallback: () => ({ psk, identity: username }),
    ciphers: PSK_CIPHERS,
    minVersion: "TLSv1.2",
    // Nobody is trusted but who knows the key: a certificate, whoever signed it, is the wrong answer.
    ca: [],
    checkServerIdentity: () => undefined,
  };
  return { connection, identity: who };
}

async function loadCertificates(
  what: string,
  address: NbdAddress,
  options: X509Options,
): Promise<TlsCredentials> {
  const { verifyPeer = true } = options;
  const hostname = options.hostname ?? (address.transport === "tcp" ? address.host : undefined);
  if (verifyPeer && (hostname === undefined || hostname === "")) {
    throw new UsageError(`${what}: a unix socket has no name that its server's certificate must bear`, {
      hint: "Add tls-hostname=NAME to the URI, the name in the server's certificate",
    });
  }
  const files = await readDirectory(what, options.certificates);
  const connection: ConnectionOptions = {
    ...files.pem,
    minVersion: "TLSv1.2",
    rejectUnauthorized: verifyPeer,
    checkServerIdentity: (_name, certificate) =>
      hostname === undefined ? undefined : checkServerIdentity(hostname, certificate),
    // Server name indication is for names only (RFC 6066, section 3).
    ...(hostname === undefined || isIP(hostname) !== 0 ? {} : { servername: hostname }),
  };
  try {
    createSecureContext(files.pem);
  } catch (error) {
    throw new UsageError(
      `${what}: the certificates in ${files.directory} are of no use: ${messageOf(error)}`,
      {
        cause: error,
      },
    );
  }
  return { connection, identity: files.client };
}

interface CertificateFiles {
  readonly directory: string;
  readonly pem: { readonly ca?: string; readonly cert?: string; readonly key?: string };
  readonly client: string | undefined;
}

async function readDirectory(what: string, given: string | undefined): Promise<CertificateFiles> {
  const candidates = given === undefined ? defaultCertificateDirectories() : [given];
  for (const directory of candidates) {
    const [ca, cert, key] = await Promise.all(
      ["ca-cert.pem", "client-cert.pem", "client-key.pem"].map((name) =>
        readIfThere(what, join(directory, name)),
      ),
    );
    if (ca === undefined) continue;
    if (cert === undefined || key === undefined) return { directory, pem: { ca }, client: undefined };
    const client = join(directory, "client-cert.pem");
    requireValid(what, client, cert);
    return { directory, pem: { ca, cert, key }, client: `client certificate ${client}` };
  }
  if (given === undefined) return { directory: candidates.join(", "), pem: {}, client: undefined };
  throw new UsageError(`${what}: ${join(given, "ca-cert.pem")} does not exist`);
}

/** A server may say no more than goodbye to an expired certificate; we can say it. */
function requireValid(what: string, path: string, pem: string): void {
  const { validFrom, validTo } = parseCertificate(what, path, pem);
  const [from, to] = [new Date(validFrom), new Date(validTo)];
  const now = new Date();
  if (from <= now && now <= to) return;
  const text = now > to ? `expired at ${to.toISOString()}` : `is not valid before ${from.toISOString()}`;
  throw new NbdConnectionError("TM_NBD_TLS_CLIENT_EXPIRED", `${what}: client certificate ${path} ${text}`, {
    hint: "Have a new one signed by the authority that the server trusts",
  });
}

function parseCertificate(what: string, path: string, pem: string): X509Certificate {
  try {
    return new X509Certificate(pem);
  } catch (cause) {
    throw new UsageError(`${what}: ${path} is not a certificate: ${messageOf(cause)}`, { cause });
  }
}

async function readNamed(what: string, path: string): Promise<string> {
  const text = await readIfThere(what, path);
  if (text === undefined) throw new UsageError(`${what}: ${path} does not exist`);
  return text;
}

async function readIfThere(what: string, path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (cause) {
    if (cause instanceof Error && "code" in cause && cause.code === "ENOENT") return undefined;
    throw new UsageError(`${what}: ${messageOf(cause)}`, { cause });
  }
}
