/**
 * NBD: the Network Block Device protocol, over sockets of `node:net`: a client, and a read-only server.
 *
 * - *socket*: a connection on which nothing was sent yet; its descriptor can be duplicated into another process.
 * - *negotiation*: the handshake; the socket becomes a client of one *export* (a disk that the server offers).
 * - *context*: a kind of map that a server keeps of an export: base:allocation, qemu:dirty-bitmap:NAME.
 * - *run*: a range of bytes that a context describes alike.
 *
 * Specification: doc/proto.md and doc/uri.md of the NetworkBlockDevice project. Spoken are fixed newstyle,
 * NBD_OPT_GO, TLS, extended headers, structured replies (simple ones where the server has no others) and metadata contexts; reading, writing,
 * writing zeroes and flushing.
 */
export { describeAddress, type NbdAddress } from "./address.js";
export type { BlockRun } from "./block-status.js";
export { connect, connectSeveral, reconnect, type ConnectOptions, type ReconnectOptions } from "./connect.js";
export { MAX_STATUS_LENGTH, type ClientOrigin, type NbdClient, type RequestOptions } from "./client.js";
export { NbdConnectionError, NbdProtocolError, NbdRequestError } from "./errors.js";
export type { BlockSize, ExportFlags, NbdExport } from "./export-info.js";
export { negotiate } from "./handshake.js";
export { listExports, type ListedExport } from "./list-exports.js";
export {
  BASE_ALLOCATION,
  dirtyBitmapContext,
  NBD_STATE_DIRTY,
  NBD_STATE_HOLE,
  NBD_STATE_ZERO,
  QEMU_ALLOCATION_DEPTH,
} from "./meta-context.js";
export type { NegotiateOptions } from "./negotiate-options.js";
export { NbdServer, type NbdServerOptions } from "./server/server.js";
export type { ServedContext, ServedExport, ServedPiece } from "./server/served-export.js";
export { openSocket, type NbdSocket, type OpenSocketOptions } from "./socket.js";
export { tlsOptionsOf, type PskOptions, type TlsOptions, type X509Options } from "./tls-options.js";
export { MAX_IN_FLIGHT } from "./transmission.js";
export { formatNbdUri, NBD_DEFAULT_PORT, parseNbdUri, type NbdUri } from "./uri.js";
