import { statSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { deferred } from "../flow/index.js";
import { formatQmpAddress, type QmpAddress } from "./address.js";
import { QmpBusyError, QmpClosedError, QmpNotFoundError } from "./errors.js";

/**
 * Connects a socket to a monitor; says and reads nothing yet.
 *
 * @throws {QmpNotFoundError} when nothing listens there
 * @throws {QmpBusyError} when others wait for it already
 * @throws {QmpClosedError} when the connection fails in another way
 */
export async function connectSocket(
  address: QmpAddress,
  options: { readonly signal?: AbortSignal | undefined } = {},
): Promise<Socket> {
  const { signal } = options;
  signal?.throwIfAborted();
  const socket =
    address.transport === "unix"
      ? connect({ path: address.path })
      : connect({ host: address.host, port: address.port, noDelay: true });
  const connected = deferred<undefined>();
  const onError = (error: Error): void => connected.reject(connectFailure(address, error));
  const onAbort = (): void => connected.reject(signal?.reason);
  socket.once("connect", () => connected.resolve(undefined));
  socket.once("error", onError);
  signal?.addEventListener("abort", onAbort, { once: true });
  try {
    await connected.promise;
    socket.off("error", onError);
    return socket;
  } catch (error) {
    socket.destroy();
    throw error;
  } finally {
    signal?.removeEventListener("abort", onAbort);
  }
}

function connectFailure(address: QmpAddress, cause: NodeJS.ErrnoException): Error {
  const what = `Cannot connect to QMP monitor ${formatQmpAddress(address)}`;
  switch (cause.code) {
    case "ENOENT":
      return new QmpNotFoundError(`${what}: no such socket`, {
        cause,
        hint: "Is the machine running, and was it started with -qmp unix:PATH,server=on,wait=off?",
      });
    case "ENOTDIR":
    case "ENOTSOCK":
      return notASocket(what, cause);
    case "ECONNREFUSED":
      if (address.transport === "unix" && !isSocket(address.path)) return notASocket(what, cause);
      return new QmpNotFoundError(`${what}: nothing listens there`, {
        cause,
        hint: "QEMU has ended, or listens at another address; start the machine or give its present socket",
      });
    case "EAGAIN":
      // unix(7): the listener's backlog is full, which for a monitor is one client that waits behind another.
      return new QmpBusyError(`${what}: other clients hold this monitor, or wait for it`, {
        cause,
        hint: "Close the other clients, or start QEMU with a second monitor (-qmp unix:PATH,server=on,wait=off)",
      });
    case "EACCES":
    case "EPERM":
      return new QmpClosedError(`${what}: permission denied`, {
        cause,
        hint: "Run as the user that QEMU runs as, or as root",
      });
    default:
      return new QmpClosedError(`${what}: ${cause.message}`, { cause });
  }
}

function isSocket(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isSocket() ?? false;
}

function notASocket(what: string, cause: Error): Error {
  return new QmpNotFoundError(`${what}: this is no socket`, {
    cause,
    hint: "Give the path of the QMP socket that QEMU was started with",
  });
}
