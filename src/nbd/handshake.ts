import { KiB, MiB } from "../bytes/index.js";
import { UsageError } from "../errors/index.js";
import { describeAddress, type NbdAddress } from "./address.js";
import { NbdClient } from "./client.js";
import {
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_MAX_STRING,
  NBD_OPT_GO,
  NBD_OPT_LIST,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
  NBD_REP_SERVER,
} from "./constants.js";
import { printable } from "./errors.js";
import {
  decodeInfoBlockSize,
  decodeInfoExport,
  DEFAULT_BLOCK_SIZE,
  type BlockSize,
  type ExportFlags,
} from "./export-info.js";
import { encodeGoData } from "./frames.js";
import { Haggle } from "./haggle.js";
import { withLimits } from "./limits.js";
import { decodeMetaContext, encodeSetMetaContext } from "./meta-context.js";
import { isUnsupported, refusalOf } from "./refusal.js";
import { openSocket, type NbdSocket, type OpenSocketOptions } from "./socket.js";
import type { NbdUri } from "./uri.js";

/** Options of `negotiate`. */
export interface NegotiateOptions {
  readonly exportName: string;
  /**
   * Metadata contexts to select, by their full names. Those that the server lacks are silently left out:
   * see `client.export.contexts`. One per connection is best (see `NbdClient.blockStatus`).
   */
  readonly contexts?: readonly string[];
  /** Longest read request, 256 KiB (default) to 1 MiB; the export's maximum block size limits it further. */
  readonly requestSize?: number | undefined;
  /** How long one request may stay unanswered before the connection is given up. Default 30 seconds. */
  readonly requestTimeoutMs?: number | undefined;
  /** How long the handshake may take. Default 10 seconds. */
  readonly timeoutMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

const DEFAULT_TIMEOUT_MS = 10_000;
const DEFAULT_REQUEST_TIMEOUT_MS = 30_000;
const MIN_REQUEST_SIZE = 256 * KiB;
const MAX_REQUEST_SIZE = 1 * MiB;

/**
 * Does the handshake (fixed newstyle: NBD_OPT_STRUCTURED_REPLY, NBD_OPT_SET_META_CONTEXT, NBD_OPT_GO) and
 * enters transmission. The socket belongs to the client from then on; when this fails, it is closed, unless it is held.
 *
 * @throws {NotFoundError} TM_NBD_NO_EXPORT when the server has no such export
 * @throws {NbdConnectionError} TM_NBD_REFUSED, TM_NBD_TIMEOUT, TM_NBD_EOF_HANDSHAKE
 * @throws {NbdProtocolError} when the server breaks the protocol
 * @throws {UsageError} when a name is too long or `requestSize` is out of its bounds
 * @throws `signal.reason` when aborted
 */
export async function negotiate(socket: NbdSocket, options: NegotiateOptions): Promise<NbdClient> {
  const { exportName, signal, timeoutMs = DEFAULT_TIMEOUT_MS } = options;
  const what = `Cannot negotiate export ${JSON.stringify(exportName)} with ${describeAddress(socket.address)}`;
  try {
    signal?.throwIfAborted();
    validate(what, options);
  } catch (error) {
    socket.abandon();
    throw error;
  }
  const work = shakeHands(socket, what, options);
  return withLimits(work, { what, timeoutMs, signal, end: (reason) => socket.abandon(reason) });
}

/**
 * Connects and negotiates.
 *
 * @param target an address, or an NBD URI (its export name wins over `options.exportName`)
 * @throws {UsageError} when the URI asks for TLS, which this client does not speak: never plain text instead
 */
export async function connect(
  target: NbdAddress | NbdUri,
  options: Omit<NegotiateOptions, "exportName"> & { readonly exportName?: string } = {},
): Promise<NbdClient> {
  const isUri = "address" in target;
  if (isUri && target.tls) {
    throw new UsageError(`Cannot connect to ${describeAddress(target.address)} with TLS: not supported`);
  }
  const address = isUri ? target.address : target;
  const exportName = isUri ? target.exportName : (options.exportName ?? "");
  const socket = await openSocket(address, options);
  return negotiate(socket, { ...options, exportName });
}

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
  options: OpenSocketOptions = {},
): Promise<readonly ListedExport[]> {
  const { signal, timeoutMs = DEFAULT_TIMEOUT_MS } = options;
  const what = `Cannot list exports of ${describeAddress(address)}`;
  const socket = await openSocket(address, options);
  return withLimits(listOn(socket, what), {
    what,
    timeoutMs,
    signal,
    end: (reason) => socket.destroy(reason),
  });
}

function validate(what: string, options: NegotiateOptions): void {
  const { exportName, contexts = [], requestSize = MIN_REQUEST_SIZE } = options;
  for (const name of [exportName, ...contexts]) {
    const length = Buffer.byteLength(name);
    if (length > NBD_MAX_STRING)
      throw new UsageError(`${what}: a name has ${length} bytes, at most ${NBD_MAX_STRING}`);
  }
  if (!(requestSize >= MIN_REQUEST_SIZE && requestSize <= MAX_REQUEST_SIZE)) {
    throw new UsageError(`${what}: requests of ${requestSize} bytes, 256 KiB to 1 MiB are allowed`);
  }
  for (const time of [options.timeoutMs, options.requestTimeoutMs]) {
    if (time !== undefined && !(time > 0)) throw new UsageError(`${what}: ${time} ms is not a time-out`);
  }
}

async function shakeHands(socket: NbdSocket, what: string, options: NegotiateOptions): Promise<NbdClient> {
  const { exportName, contexts = [], requestSize = MIN_REQUEST_SIZE } = options;
  const haggle = await Haggle.begin(socket, what);
  const structuredReplies = await askStructuredReplies(haggle);
  const contextIds = structuredReplies ? await setMetaContext(haggle, exportName, contexts) : new Map();
  const information = await go(haggle, exportName);
  const client = new NbdClient(
    socket,
    { name: exportName, ...information, contexts: [...contextIds.keys()], structuredReplies },
    { contextIds, requestSize, requestTimeoutMs: options.requestTimeoutMs ?? DEFAULT_REQUEST_TIMEOUT_MS },
  );
  client.begin(haggle.rest());
  return client;
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

async function listOn(socket: NbdSocket, what: string): Promise<readonly ListedExport[]> {
  const haggle = await Haggle.begin(socket, what);
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
