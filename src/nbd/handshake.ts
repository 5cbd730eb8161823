import { describeAddress } from "./address.js";
import { NbdClient } from "./client.js";
import {
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_OPT_EXTENDED_HEADERS,
  NBD_OPT_GO,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
} from "./constants.js";
import { printable } from "./errors.js";
import {
  decodeInfoBlockSize,
  decodeInfoExport,
  DEFAULT_BLOCK_SIZE,
  type BlockSize,
  type ExportFlags,
  type NbdExport,
} from "./export-info.js";
import { encodeGoData } from "./frames.js";
import type { Haggle } from "./haggle.js";
import { withLimits } from "./limits.js";
import { decodeMetaContext, encodeSetMetaContext } from "./meta-context.js";
import {
  DEFAULT_REQUEST_TIMEOUT_MS,
  DEFAULT_TIMEOUT_MS,
  MIN_REQUEST_SIZE,
  validateOptions,
  type NegotiateOptions,
} from "./negotiate-options.js";
import { isUnsupported, refusalOf } from "./refusal.js";
import type { NbdSocket } from "./socket.js";
import { beginHaggle } from "./starttls.js";

/**
 * Does the handshake (fixed newstyle: NBD_OPT_STARTTLS where TLS is wanted, NBD_OPT_EXTENDED_HEADERS or
 * NBD_OPT_STRUCTURED_REPLY, NBD_OPT_SET_META_CONTEXT, NBD_OPT_GO) and
 * enters transmission. The socket belongs to the client from then on; when this fails, it is closed, unless it is held.
 *
 * @throws {NotFoundError} TM_NBD_NO_EXPORT when the server has no such export
 * @throws {NbdConnectionError} TM_NBD_REFUSED, TM_NBD_TIMEOUT, TM_NBD_EOF_HANDSHAKE
 * @throws {NbdConnectionError} TM_NBD_TLS_… when TLS is wanted and does not come about
 * @throws {NbdProtocolError} when the server breaks the protocol
 * @throws {UsageError} when a name is too long or `requestSize` is out of its bounds
 * @throws `signal.reason` when aborted
 */
export async function negotiate(socket: NbdSocket, options: NegotiateOptions): Promise<NbdClient> {
  const { exportName, signal, timeoutMs = DEFAULT_TIMEOUT_MS } = options;
  const what = `Cannot negotiate export ${JSON.stringify(exportName)} with ${describeAddress(socket.address)}`;
  try {
    signal?.throwIfAborted();
    validateOptions(what, options);
  } catch (error) {
    socket.abandon();
    throw error;
  }
  const work = shakeHands(socket, what, options);
  return withLimits(work, { what, timeoutMs, signal, end: (reason) => socket.abandon(reason) });
}

async function shakeHands(socket: NbdSocket, what: string, options: NegotiateOptions): Promise<NbdClient> {
  const { exportName, contexts = [], requestSize = MIN_REQUEST_SIZE } = options;
  const haggle = await beginHaggle(socket, what, options.tls);
  const headers = await askHeaders(haggle);
  const contextIds = headers.structuredReplies
    ? await setMetaContext(haggle, exportName, contexts)
    : new Map();
  const information = await go(haggle, exportName);
  const client = new NbdClient(
    socket,
    { name: exportName, ...information, contexts: [...contextIds.keys()], ...headers },
    {
      contextIds,
      requestSize,
      requestTimeoutMs: options.requestTimeoutMs ?? DEFAULT_REQUEST_TIMEOUT_MS,
      origin: { address: socket.address, negotiated: options },
    },
  );
  client.begin(haggle.rest());
  return client;
}

type Headers = Pick<NbdExport, "structuredReplies" | "extendedHeaders">;

/** The best that the server has: extended headers (QEMU 8.2), structured replies, or neither. */
async function askHeaders(haggle: Haggle): Promise<Headers> {
  const extended = await haggle.ask(NBD_OPT_EXTENDED_HEADERS);
  if (extended.accepted) return { structuredReplies: true, extendedHeaders: true };
  if (!isUnsupported(extended)) throw await refusalOf(haggle, "extended headers", extended);
  return { structuredReplies: await askStructuredReplies(haggle), extendedHeaders: false };
}

async function askStructuredReplies(haggle: Haggle): Promise<boolean> {
  const outcome = await haggle.ask(NBD_OPT_STRUCTURED_REPLY);
  if (!outcome.accepted && !isUnsupported(outcome))
    throw await refusalOf(haggle, "structured replies", outcome);
  return outcome.accepted;
}

/** The ids of the contexts that the server selected, by name, in the server's order. */
async function setMetaContext(
  haggle: Haggle,
  exportName: string,
  contexts: readonly string[],
): Promise<Map<string, number>> {
  const asked = new Set(contexts);
  const selected = new Map<string, number>();
  if (asked.size === 0) return selected;
  const data = encodeSetMetaContext(exportName, [...asked]);
  const outcome = await haggle.ask(NBD_OPT_SET_META_CONTEXT, data, (type, reader) => {
    if (type !== NBD_REP_META_CONTEXT) haggle.fault("TM_NBD_OPTION_REPLY", `reply ${type} to context query`);
    const { id, name } = decodeMetaContext(reader.bytes(reader.remaining));
    if (!asked.has(name) || selected.has(name)) {
      haggle.fault("TM_NBD_UNASKED_CONTEXT", `server selected context "${printable(name)}" unasked`);
    }
    if ([...selected.values()].includes(id)) {
      haggle.fault("TM_NBD_CONTEXT_ID", `server gave the id ${id} to two contexts`);
    }
    selected.set(name, id);
  });
  if (!outcome.accepted && !isUnsupported(outcome))
    throw await refusalOf(haggle, "metadata contexts", outcome);
  return selected;
}

async function go(
  haggle: Haggle,
  exportName: string,
): Promise<{ size: number; flags: ExportFlags; blockSize: BlockSize }> {
  let information: { size: number; flags: ExportFlags } | undefined;
  let blockSize = DEFAULT_BLOCK_SIZE;
  const data = encodeGoData(exportName, [NBD_INFO_BLOCK_SIZE]);
  const outcome = await haggle.ask(NBD_OPT_GO, data, (type, reader) => {
    if (type !== NBD_REP_INFO) haggle.fault("TM_NBD_OPTION_REPLY", `reply ${type} to NBD_OPT_GO`);
    const kind = reader.u16();
    if (kind === NBD_INFO_EXPORT) information = decodeInfoExport(reader, haggle.fault);
    else if (kind === NBD_INFO_BLOCK_SIZE) blockSize = decodeInfoBlockSize(reader, haggle.fault);
    // "The client MUST ignore information types that it does not understand"
  });
  if (!outcome.accepted) throw await refusalOf(haggle, "the export", outcome);
  if (information === undefined) {
    return haggle.fault("TM_NBD_OPTION_REPLY", "server did not tell the size of the export");
  }
  return { ...information, blockSize };
}
