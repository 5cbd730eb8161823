import { UsageError } from "../errors/index.js";

/** Where a monitor listens. */
export type QmpAddress =
  | { readonly transport: "unix"; readonly path: string }
  | { readonly transport: "tcp"; readonly host: string; readonly port: number };

const HOST_AND_PORT = /^(?:tcp:)?(?:\[([0-9A-Fa-f:.%]+)\]|([^:/[\]]+)):(\d{1,5})$/;

/** Bytes of the longest path that a unix socket can have: sockaddr_un.sun_path has 108, the last of them zero. */
export const LONGEST_SOCKET_PATH = 107;

/**
 * Reads `/path`, `unix:/path`, `tcp:host:port`, `host:port` or `[v6 address]:port`. A text without a
 * colon is a path, relative ones included.
 *
 * @throws {UsageError} when the text is none of these
 */
export function parseQmpAddress(text: string): QmpAddress {
  const [, address6, name, digits] = HOST_AND_PORT.exec(text) ?? [];
  const host = address6 ?? name;
  if (host !== undefined && digits !== undefined && !text.startsWith("unix:")) {
    const port = Number(digits);
    if (port >= 1 && port <= 65535) return { transport: "tcp", host, port };
    throw new UsageError(`QMP address "${text}" has port ${port}, not one of 1 to 65535`);
  }
  const path = text.startsWith("unix:") ? text.slice("unix:".length) : text;
  if (path === "" || path.includes("\0") || text.startsWith("tcp:")) {
    throw new UsageError(`"${text}" is no QMP address`, {
      hint: "Give the path of QEMU's QMP socket, or host:port",
    });
  }
  if (Buffer.byteLength(path) > LONGEST_SOCKET_PATH) {
    throw new UsageError(
      `QMP socket path has ${Buffer.byteLength(path)} bytes, a socket's path has at most ${LONGEST_SOCKET_PATH}: ${path}`,
      { hint: "Give a shorter path, for example through a symbolic link" },
    );
  }
  return { transport: "unix", path };
}

/** The address as a person writes it. */
export function formatQmpAddress(address: QmpAddress): string {
  if (address.transport === "unix") return address.path;
  return address.host.includes(":") ? `[${address.host}]:${address.port}` : `${address.host}:${address.port}`;
}
