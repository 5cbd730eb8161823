import { homedir, userInfo } from "node:os";
import { join } from "node:path";
import { UsageError } from "../errors/index.js";
import { describeAddress } from "./address.js";
import type { NbdUri } from "./uri.js";

/** Certificates: who the server is, and who we are. */
export interface X509Options {
  readonly type: "x509";
  /**
   * Directory with `ca-cert.pem` and, where the server asks for them, `client-cert.pem` and `client-key.pem`. Default:
   * /etc/pki/libnbd for root, else ~/.pki/libnbd or ~/.config/pki/libnbd; where none of them is, the authorities
   * that Node trusts.
   */
  readonly certificates?: string | undefined;
  /** The name that the server's certificate must bear. Default: the host of the address; a unix socket has none. */
  readonly hostname?: string | undefined;
  /** Whether the server must prove who it is. Default true; without, the connection is encrypted and no more. */
  readonly verifyPeer?: boolean | undefined;
}

/** A secret that both sides know. */
export interface PskOptions {
  readonly type: "psk";
  /** File of lines `user:key`, the key in hexadecimal: what psktool writes. */
  readonly pskFile: string;
  /** Whose key it is. Default: the name of the user who runs this. */
  readonly username?: string | undefined;
}

/** How a connection is encrypted. Plain data: file names, no secrets. */
export type TlsOptions = X509Options | PskOptions;

/** Where libnbd and its tools look, too. */
export function defaultCertificateDirectories(): readonly string[] {
  if (userInfo().uid === 0) return ["/etc/pki/libnbd"];
  return [join(homedir(), ".pki", "libnbd"), join(homedir(), ".config", "pki", "libnbd")];
}

/**
 * How the connection of an NBD URI is to be encrypted; undefined when its scheme is without TLS.
 *
 * Follows the section "NBD URI query parameters related to TLS" of doc/uri.md, and `tls-certificates`,
 * `tls-psk-file` and `tls-username` of libnbd. The kind of authentication is what `tls-type` says, else PSK where a
 * key file is named, else certificates.
 *
 * @throws {UsageError} when the parameters contradict each other or the scheme, or ask for what is not supported
 */
export function tlsOptionsOf(uri: NbdUri): TlsOptions | undefined {
  const { parameters, tls } = uri;
  const refuse = (why: string, hint?: string): never => {
    throw new UsageError(`Cannot connect to ${describeAddress(uri.address)} with TLS: ${why}`, { hint });
  };
  const given = Object.keys(parameters).find((name) => name.startsWith("tls-"));
  if (!tls) {
    if (given === undefined) return undefined;
    return refuse(`the URI has ${given} and a scheme without TLS`, "Write nbds:// or nbds+unix://");
  }
  const pskFile = parameters["tls-psk-file"];
  const certificates = parameters["tls-certificates"];
  const type = parameters["tls-type"] ?? (pskFile === undefined ? "x509" : "psk");
  if (type === "psk") {
    if (certificates !== undefined) return refuse("it is either tls-psk-file or tls-certificates");
    if (pskFile === undefined || pskFile === "") return refuse("tls-psk-file is missing");
    return { type, pskFile, username: parameters["tls-username"] ?? uri.username };
  }
  if (type === "anon") {
    return refuse("anonymous TLS proves nothing about the server, and is not supported", "Use x509 or psk");
  }
  if (type !== "x509") return refuse(`tls-type ${JSON.stringify(type)} is not known`);
  if (pskFile !== undefined) return refuse("tls-psk-file needs tls-type=psk");
  return { type, certificates, hostname: parameters["tls-hostname"], verifyPeer: verifyPeerOf(uri, refuse) };
}

function verifyPeerOf(uri: NbdUri, refuse: (why: string) => never): boolean {
  const value = uri.parameters["tls-verify-peer"] ?? "1";
  if (value !== "0" && value !== "1") refuse(`tls-verify-peer is ${JSON.stringify(value)}, not 0 or 1`);
  return value === "1";
}
