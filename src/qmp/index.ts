/**
 * QMP: the protocol in which QEMU (and qemu-storage-daemon) is told what to do.
 *
 * - monitor: QEMU's end of the connection; it serves one client at a time and queues the others without a word.
 * - command: a request with an id; its reply bears the same id, and events may come between.
 * - event: what QEMU says unasked. A *watch* collects events from the moment it is made, so it is made before
 *   the command whose effect it waits for.
 * - schema: QEMU's own description of its commands; features are probed there, never guessed from the version.
 *
 * Specification: docs/interop/qmp-spec.txt and the QAPI reference of QEMU.
 */
export { formatQmpAddress, LONGEST_SOCKET_PATH, parseQmpAddress, type QmpAddress } from "./address.js";
export { QmpClient, type ConnectOptions, type ExecuteOptions } from "./client.js";
export type {
  CommandArguments,
  CommandName,
  CommandResult,
  DriverOptions,
  TransactionAction,
} from "./commands.js";
export {
  QmpBusyError,
  QmpClosedError,
  QmpCommandError,
  QmpNotFoundError,
  QmpProtocolError,
} from "./errors.js";
export type { QmpEvent, EventWatch, EventFilter, WaitOptions } from "./events.js";
export type { QmpGreeting } from "./messages.js";
export { QmpRecord } from "./record.js";
export type {
  BitmapInfo,
  BlockDevice,
  BlockGraph,
  BlockNode,
  ExportInfo,
  GraphEdge,
  GraphNode,
  ImageInfo,
  JobInfo,
  NodeStatistics,
  QomProperty,
} from "./results.js";
export { QmpSchema, type SchemaQuestion } from "./schema.js";
