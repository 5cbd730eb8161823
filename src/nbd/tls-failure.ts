import type { TLSSocket } from "node:tls";

/**
 * Why TLS did not come about:
 *
 * - "expired", "name", "untrusted": this side does not accept the server's certificate;
 * - "mismatch": the server ended the handshake: it found nothing that both sides speak;
 * - "goodbye": the server ended it because of our certificate, or that there is none;
 * - "other": anything else.
 */
export type TlsFailureKind = "expired" | "name" | "untrusted" | "mismatch" | "goodbye" | "other";

/** TLS did not come about. */
export class TlsFailure extends Error {
  readonly kind: TlsFailureKind;

  constructor(message: string, kind: TlsFailureKind, cause?: unknown) {
    super(message, { cause });
    this.kind = kind;
  }

  /** Of an error that the handshake ended with. */
  static ofError(secure: TLSSocket, error: Error): TlsFailure {
    return new TlsFailure(error.message, kindOf(secure, "code" in error ? String(error.code) : ""), error);
  }
}

function kindOf(secure: TLSSocket, code: string): TlsFailureKind {
  // Typed as an Error, but it is the code of one: the verdict on the server's certificate. Null when there is none.
  const verdict = secure.authorizationError as Error | string | null | undefined;
  if (verdict !== undefined && verdict !== null) {
    if (code === "CERT_HAS_EXPIRED" || code === "CERT_NOT_YET_VALID") return "expired";
    return code === "ERR_TLS_CERT_ALTNAME_INVALID" ? "name" : "untrusted";
  }
  if (code.includes("_ALERT_")) return /CERT|UNKNOWN_CA|ACCESS_DENIED/.test(code) ? "goodbye" : "mismatch";
  return code === "ECONNRESET" || code === "EPIPE" ? "mismatch" : "other";
}
