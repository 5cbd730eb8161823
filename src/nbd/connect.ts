import { describeAddress, type NbdAddress } from "./address.js";
import type { NbdClient } from "./client.js";
import { NbdConnectionError } from "./errors.js";
import type { NbdExport } from "./export-info.js";
import { negotiate } from "./handshake.js";
import type { NegotiateOptions } from "./negotiate-options.js";
import { openSocket, type NbdSocket } from "./socket.js";
import { tlsOptionsOf } from "./tls-options.js";
import type { NbdUri } from "./uri.js";

/** Options of `connect`: those of `negotiate`, and the export's name when the target is an address. */
export type ConnectOptions = Omit<NegotiateOptions, "exportName"> & { readonly exportName?: string };

/**
 * Connects and negotiates.
 *
 * @param target an address, or an NBD URI (its export name and its TLS parameters win over those of `options`)
 * @throws {UsageError} when the URI's TLS parameters make no sense
 * @throws as `openSocket` and `negotiate`
 */
export async function connect(target: NbdAddress | NbdUri, options: ConnectOptions = {}): Promise<NbdClient> {
  const isUri = "address" in target;
  const address = isUri ? target.address : target;
  const exportName = isUri ? target.exportName : (options.exportName ?? "");
  const tls = (isUri ? tlsOptionsOf(target) : undefined) ?? options.tls;
  const socket = await openSocket(address, options);
  return negotiate(socket, { ...options, exportName, tls });
}

/**
 * Several connections to one export, for requests at the same time; one where the server does not say that
 * several see one state (`canMultiConn`): a flush on one of them would then not cover the others.
 *
 * @param count most connections wanted, at least 1
 * @returns one to `count` clients, to be closed by the caller
 * @throws as `connect`; nothing stays open then
 */
export async function connectSeveral(
  target: NbdAddress | NbdUri,
  count: number,
  options: ConnectOptions = {},
): Promise<readonly [NbdClient, ...NbdClient[]]> {
  const first = await connect(target, options);
  if (!first.export.flags.canMultiConn) return [first];
  const wanted = Array.from({ length: count - 1 }, () => connect(target, options));
  const outcomes = await Promise.allSettled(wanted);
  const clients = outcomes.flatMap((outcome) => (outcome.status === "fulfilled" ? [outcome.value] : []));
  try {
    for (const outcome of outcomes) if (outcome.status === "rejected") throw outcome.reason;
    for (const client of clients) requireSame(client, first.export);
  } catch (error) {
    for (const client of [first, ...clients]) client.destroy();
    throw error;
  }
  return [first, ...clients];
}

/** Options of `reconnect`. */
export interface ReconnectOptions extends Pick<NegotiateOptions, "signal" | "timeoutMs"> {
  /** A connection to the same address that is open already; nothing was said on it. Default: one is made. */
  readonly socket?: NbdSocket | undefined;
}

/**
 * A new connection in place of `previous`, to the same address, with everything negotiated anew as it was then.
 * Never done behind anybody's back: what the old connection was asked and did not answer has failed, and is not
 * asked again. `previous` itself is left as it is.
 *
 * @throws {NbdConnectionError} TM_NBD_EXPORT_CHANGED when the export is not what it was: another size, other
 *   flags or block sizes, or other contexts; a socket that is held stays open then
 * @throws as `connect`
 */
export async function reconnect(previous: NbdClient, options: ReconnectOptions = {}): Promise<NbdClient> {
  const { address, negotiated } = previous.origin;
  const { signal, timeoutMs = negotiated.timeoutMs } = options;
  const socket = options.socket ?? (await openSocket(address, { signal, timeoutMs }));
  const client = await negotiate(socket, { ...negotiated, signal, timeoutMs });
  try {
    requireSame(client, previous.export);
  } catch (error) {
    socket.abandon();
    throw error;
  }
  return client;
}

function requireSame(client: NbdClient, before: NbdExport): void {
  const now = client.export;
  const facts = [
    ["size", before.size, now.size],
    ["flags", names(before.flags), names(now.flags)],
    ["block sizes", Object.values(before.blockSize).join("/"), Object.values(now.blockSize).join("/")],
    ["contexts", before.contexts.join(" "), now.contexts.join(" ")],
  ] as const;
  for (const [what, then, seen] of facts) {
    if (then === seen) continue;
    const where = `export ${JSON.stringify(now.name)} of ${describeAddress(client.origin.address)}`;
    const text = `its ${what} changed from ${JSON.stringify(then)} to ${JSON.stringify(seen)}`;
    throw new NbdConnectionError("TM_NBD_EXPORT_CHANGED", `Cannot go on with ${where}: ${text}`, {
      hint: "The server offers another disk under this name, or offers it in another way",
    });
  }
}

/** The flags that are set. */
function names(flags: NbdExport["flags"]): string {
  const set = Object.entries(flags).filter(([, isSet]) => isSet === true);
  return set.map(([name]) => name).join(" ");
}
