import { describeAddress, type NbdAddress } from "./address.js";
import { NBD_OPT_LIST, NBD_REP_SERVER } from "./constants.js";
import { withLimits } from "./limits.js";
import { DEFAULT_TIMEOUT_MS, type NegotiateOptions } from "./negotiate-options.js";
import { refusalOf } from "./refusal.js";
import { openSocket, type NbdSocket, type OpenSocketOptions } from "./socket.js";
import { beginHaggle } from "./starttls.js";
import type { TlsOptions } from "./tls-options.js";

/** One entry of a server's list. */
export interface ListedExport {
  readonly name: string;
  /** The server's words about it; often empty. */
  readonly description: string;
}

/**
 * The exports that a server shows (NBD_OPT_LIST), in its order, on a connection of its own.
 *
 * @throws {NbdConnectionError} TM_NBD_REFUSED when the server does not tell; else as `negotiate`
 */
export async function listExports(
  address: NbdAddress,
  options: OpenSocketOptions & Pick<NegotiateOptions, "tls"> = {},
): Promise<readonly ListedExport[]> {
  const { signal, timeoutMs = DEFAULT_TIMEOUT_MS } = options;
  const what = `Cannot list exports of ${describeAddress(address)}`;
  const socket = await openSocket(address, options);
  return withLimits(listOn(socket, what, options.tls), {
    what,
    timeoutMs,
    signal,
    end: (reason) => socket.destroy(reason),
  });
}

async function listOn(
  socket: NbdSocket,
  what: string,
  tls: TlsOptions | undefined,
): Promise<readonly ListedExport[]> {
  const haggle = await beginHaggle(socket, what, tls);
  const exports: ListedExport[] = [];
  const outcome = await haggle.ask(NBD_OPT_LIST, undefined, (type, reader) => {
    if (type !== NBD_REP_SERVER) haggle.fault("TM_NBD_OPTION_REPLY", `reply ${type} to NBD_OPT_LIST`);
    // 32 bits, length of name; name; the rest is a text for people
    const name = reader.text(reader.u32());
    exports.push({ name, description: reader.text(reader.remaining) });
  });
  if (!outcome.accepted) throw await refusalOf(haggle, "the list", outcome);
  await haggle.abort();
  return exports;
}
