import { NotFoundError, type TidemarkError } from "../errors/index.js";
import {
  NBD_REP_ERR_BLOCK_SIZE_REQD,
  NBD_REP_ERR_EXT_HEADER_REQD,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_PLATFORM,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
} from "./constants.js";
import { NbdConnectionError, printable } from "./errors.js";
import type { Haggle } from "./haggle.js";

/** A server's refusal of an option. */
export interface Refusal {
  /** NBD_REP_ERR_… */
  readonly type: number;
  /** The server's words. */
  readonly text: string;
}

const NAMES: ReadonlyMap<number, string> = new Map([
  [NBD_REP_ERR_UNSUP, "NBD_REP_ERR_UNSUP"],
  [NBD_REP_ERR_POLICY, "NBD_REP_ERR_POLICY"],
  [NBD_REP_ERR_INVALID, "NBD_REP_ERR_INVALID"],
  [NBD_REP_ERR_PLATFORM, "NBD_REP_ERR_PLATFORM"],
  [NBD_REP_ERR_TLS_REQD, "NBD_REP_ERR_TLS_REQD"],
  [NBD_REP_ERR_UNKNOWN, "NBD_REP_ERR_UNKNOWN"],
  [NBD_REP_ERR_SHUTDOWN, "NBD_REP_ERR_SHUTDOWN"],
  [NBD_REP_ERR_BLOCK_SIZE_REQD, "NBD_REP_ERR_BLOCK_SIZE_REQD"],
  [NBD_REP_ERR_TOO_BIG, "NBD_REP_ERR_TOO_BIG"],
  [NBD_REP_ERR_EXT_HEADER_REQD, "NBD_REP_ERR_EXT_HEADER_REQD"],
]);

const HINTS: ReadonlyMap<number, string> = new Map([
  [NBD_REP_ERR_UNSUP, "The server is too old: fixed newstyle with NBD_OPT_GO is needed"],
  [NBD_REP_ERR_TLS_REQD, "The server speaks TLS only: use nbds:// or nbds+unix://"],
  [NBD_REP_ERR_SHUTDOWN, "The server is being shut down"],
]);

/** Whether a server only says that it does not know the option: one can go on without. */
export function isUnsupported(refusal: Refusal): boolean {
  return refusal.type === NBD_REP_ERR_UNSUP;
}

/**
 * Ends haggling because of a refusal, in the orderly way, and makes its error.
 *
 * @param thing what was refused: "the export"
 * @param code of the error, where an unknown export is not the reason
 */
export async function refusalOf(
  haggle: Haggle,
  thing: string,
  refusal: Refusal,
  code = "TM_NBD_REFUSED",
): Promise<TidemarkError> {
  await haggle.abort();
  const name = NAMES.get(refusal.type) ?? `error 0x${refusal.type.toString(16)}`;
  const words = refusal.text === "" ? "" : ` (${printable(refusal.text)})`;
  const message = `${haggle.action}: server refuses ${thing}: ${name}${words}`;
  const details = { hint: HINTS.get(refusal.type) };
  return refusal.type === NBD_REP_ERR_UNKNOWN
    ? new NotFoundError("TM_NBD_NO_EXPORT", message, details)
    : new NbdConnectionError(code, message, details);
}
