import { ConnectionError, ProtocolError, RequestError, type ErrorDetails } from "../errors/index.js";

/** The connection ended without the server breaking the protocol: closed, timed out, not reachable. */
export class NbdConnectionError extends ConnectionError {}

/** The server broke the protocol; the connection was closed because of it. */
export class NbdProtocolError extends ProtocolError {}

/** Throws the NbdProtocolError of what a message belongs to. `text` says what the server did, and should have done. */
export type Fault = (code: string, text: string) => never;

/** A Fault whose messages begin with `action`: `Cannot read 512 bytes at 0 of export "sda"`. */
export function faultOf(action: string): Fault {
  return (code, text) => {
    throw new NbdProtocolError(code, `${action}: ${text}`);
  };
}

/** The server refused one request; the connection still works. */
export class NbdRequestError extends RequestError {
  /** The error value of the reply, as the specification numbers them. */
  readonly errno: number;
  /** Its name: "EINVAL". */
  readonly errorName: string;

  /**
   * @param action what was tried: `Cannot read 512 bytes at 0 of export "sda"`
   * @param text the server's own words, "" if it sent none
   */
  constructor(action: string, errno: number, text: string, details?: ErrorDetails) {
    const errorName = errorNameOf(errno);
    const words = text === "" ? "" : ` (${printable(text)})`;
    super("TM_NBD_REQUEST", `${action}: server answered ${errorName}${words}`, details);
    this.errno = errno;
    this.errorName = errorName;
  }
}

/** "Error values" of the specification. */
const ERROR_NAMES: ReadonlyMap<number, string> = new Map([
  [1, "EPERM"],
  [5, "EIO"],
  [12, "ENOMEM"],
  [22, "EINVAL"],
  [28, "ENOSPC"],
  [75, "EOVERFLOW"],
  [95, "ENOTSUP"],
  [108, "ESHUTDOWN"],
]);

/** Name of an error value of the protocol. */
export function errorNameOf(errno: number): string {
  return ERROR_NAMES.get(errno) ?? `error ${errno}`;
}

/** A peer's words made safe to show: no control characters, at most 256 characters. */
export function printable(text: string): string {
  const clean = text.replace(/\p{C}/gu, "?");
  return clean.length > 256 ? `${clean.slice(0, 253)}...` : clean;
}
