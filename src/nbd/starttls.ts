import { NBD_OPT_STARTTLS } from "./constants.js";
import { NbdConnectionError } from "./errors.js";
import { Haggle } from "./haggle.js";
import { refusalOf } from "./refusal.js";
import type { NbdSocket } from "./socket.js";
import { loadCredentials, type TlsCredentials } from "./tls-credentials.js";
import { TlsFailure } from "./tls-failure.js";
import type { TlsOptions } from "./tls-options.js";

/**
 * Reads the greeting and, where TLS is wanted, does NBD_OPT_STARTTLS and the TLS handshake behind it. It is the first
 * option, and there is no way around it: where it fails, nothing else was said, and nothing will be.
 *
 * @param what for messages: `Cannot negotiate export "sda" with unix:/run/vm.sock`
 * @throws {NbdConnectionError} TM_NBD_TLS_REFUSED when the server has no TLS; TM_NBD_TLS_UNTRUSTED,
 *   TM_NBD_TLS_EXPIRED, TM_NBD_TLS_NAME when its certificate is not good; TM_NBD_TLS_CLIENT_CERTIFICATE,
 *   TM_NBD_TLS_CLIENT_EXPIRED when ours is not; TM_NBD_TLS_PSK; TM_NBD_TLS for anything else
 * @throws {UsageError} when the files for it are not there; nothing was said then
 */
export async function beginHaggle(
  socket: NbdSocket,
  what: string,
  tls: TlsOptions | undefined,
): Promise<Haggle> {
  if (tls === undefined) return Haggle.begin(socket, what);
  const credentials = await loadCredentials(what, socket.address, tls);
  const haggle = await Haggle.begin(socket, what);
  const outcome = await haggle.ask(NBD_OPT_STARTTLS);
  if (!outcome.accepted) throw await refusalOf(haggle, "TLS", outcome, "TM_NBD_TLS_REFUSED");
  // A server judges a client's certificate or key last: it may say no when all looks well on this side.
  await haggle.encrypt(credentials.connection, (error) => failureOf(what, error, tls.type, credentials));
  return haggle;
}

/** @param error a TlsFailure, or how the connection ended when the first option was asked through TLS */
function failureOf(
  action: string,
  error: Error,
  type: TlsOptions["type"],
  { identity }: TlsCredentials,
): NbdConnectionError {
  const make = (code: string, text: string, hint?: string): NbdConnectionError =>
    new NbdConnectionError(code, `${action}: ${text}: ${error.message}`, { cause: error, hint });
  if (type === "psk")
    return make("TM_NBD_TLS_PSK", `server and ${identity ?? "we"} do not share a key`, PSK_HINT);
  switch (error instanceof TlsFailure ? error.kind : "goodbye") {
    case "name":
      return make("TM_NBD_TLS_NAME", "certificate is another server's", NAME_HINT);
    case "expired":
      return make("TM_NBD_TLS_EXPIRED", "server's certificate is not valid today");
    case "untrusted":
      return make("TM_NBD_TLS_UNTRUSTED", "server's certificate is not trusted", CA_HINT);
    case "mismatch":
      return make("TM_NBD_TLS", "server ended the handshake of TLS", KIND_HINT);
    case "other":
      return make("TM_NBD_TLS", "TLS failed");
    case "goodbye": {
      const wanted =
        identity === undefined ? "a client certificate, and there is none" : `another than ${identity}`;
      return make("TM_NBD_TLS_CLIENT_CERTIFICATE", `server seems to want ${wanted}`, CLIENT_HINT);
    }
  }
}

const PSK_HINT =
  "User and key must stand in the server's key file as in ours; a server with certificates has no keys";
const KIND_HINT = "The server may want a shared key (tls-psk-file=FILE), or a client certificate";
const NAME_HINT = "Connect to the name in the certificate, or give it as tls-hostname=NAME";
const CA_HINT = "ca-cert.pem in the directory of tls-certificates= must be that of the server's authority";
const CLIENT_HINT =
  "client-cert.pem and client-key.pem must be signed by the authority that the server trusts";
