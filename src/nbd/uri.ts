import { UsageError } from "../errors/index.js";
import type { NbdAddress } from "./address.js";

/** The port of NBD that IANA assigned. */
export const NBD_DEFAULT_PORT = 10809;

/** What an NBD URI says. */
export interface NbdUri {
  readonly address: NbdAddress;
  /** Free text, not a path; "" is the server's default export. */
  readonly exportName: string;
  /** Scheme nbds or nbds+unix: the connection must be encrypted or fail. */
  readonly tls: boolean;
  /** User of a TLS pre-shared key: `nbds://USER@HOST/`, `nbds+unix://USER@/?socket=…`. */
  readonly username?: string;
  /** Query parameters except `socket`: `tls-…`, and experimental ones (`x-…`). */
  readonly parameters: Readonly<Record<string, string>>;
}

/** Parameters of the specification, and those that libnbd has besides. */
const TLS_PARAMETERS: ReadonlySet<string> = new Set([
  "tls-type",
  "tls-hostname",
  "tls-verify-peer",
  "tls-certificates",
  "tls-psk-file",
  "tls-username",
]);

/** RFC 3986, appendix B: scheme, authority, path, query, fragment. */
const URI = /^([^:/?#]+):(?:\/\/([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?$/;
/** RFC 3986, section 3.2: userinfo, host (an IPv6 address in brackets or anything else), port. */
const AUTHORITY = /^(?:([^@]*)@)?(\[[0-9A-Fa-f:.]+\]|[^:[\]@]*)(?::([0-9]*))?$/;
const SCHEME = /^nbd(s?)(\+unix)?$/i;

/**
 * Parses an NBD URI.
 *
 * Follows doc/uri.md of the NetworkBlockDevice project and RFC 3986. Where the former leaves the choice to
 * the client: a TCP URI without host means localhost, a unix URI with an authority is an error.
 *
 * @example parseNbdUri("nbd+unix:///disk?socket=/run/vm.sock")
 * @throws {UsageError} when it is none, or carries a parameter that is not known
 */
export function parseNbdUri(text: string): NbdUri {
  const refuse = (why: string): never => {
    throw new UsageError(`Cannot use NBD URI ${JSON.stringify(text)}: ${why}`, {
      hint: "Write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    });
  };
  if (/[\s\p{Cc}]/u.test(text)) refuse("white space and control characters must be percent-encoded");
  const [, scheme, authority, path = "", query, fragment] = URI.exec(text) ?? refuse("it is not a URI");
  const [, secure, unix] =
    SCHEME.exec(scheme ?? "") ?? refuse("the scheme is not nbd, nbds, nbd+unix or nbds+unix");
  if (fragment !== undefined) refuse("it has a fragment (#)");
  if (path !== "" && !path.startsWith("/")) refuse("the export name must follow a slash");

  const exportName = decode(path.slice(1), refuse);
  if (exportName.includes("\0")) refuse("the export name contains NUL");
  const { socket, ...parameters } = parseQuery(query, refuse);
  const tls = secure !== "";
  if (unix !== undefined) {
    const [, name, host, port] = AUTHORITY.exec(authority ?? "") ?? refuse("the user's name is malformed");
    if (host !== "" || port !== undefined) refuse("a unix socket has no host");
    if (socket === undefined || socket === "") return refuse("the parameter socket is missing");
    const user = name === undefined ? {} : { username: decode(name, refuse) };
    return { address: { transport: "unix", path: socket }, exportName, tls, ...user, parameters };
  }
  if (socket !== undefined) refuse("the parameter socket needs the scheme nbd+unix or nbds+unix");
  const { username, ...address } = parseAuthority(authority ?? "", refuse);
  const user = username === undefined ? {} : { username };
  return { address: { transport: "tcp", ...address }, exportName, tls, ...user, parameters };
}

type Refuse = (why: string) => never;

function parseAuthority(text: string, refuse: Refuse): { username?: string; host: string; port: number } {
  const [, user, rawHost = "", rawPort = ""] = AUTHORITY.exec(text) ?? refuse("host or port is malformed");
  const port = rawPort === "" ? NBD_DEFAULT_PORT : Number(rawPort);
  if (port < 1 || port > 65535) refuse(`port ${rawPort} is not between 1 and 65535`);
  const host = rawHost.startsWith("[") ? rawHost.slice(1, -1) : decode(rawHost, refuse);
  const username = user === undefined ? {} : { username: decode(user, refuse) };
  return { ...username, host: host === "" ? "localhost" : host, port };
}

function parseQuery(query: string | undefined, refuse: Refuse): Record<string, string> {
  const found = new Map<string, string>();
  for (const item of query === undefined || query === "" ? [] : query.split("&")) {
    const equals = item.indexOf("=");
    const name = decode(equals < 0 ? item : item.slice(0, equals), refuse);
    if (name !== "socket" && !TLS_PARAMETERS.has(name) && !name.startsWith("x-")) {
      refuse(`the parameter ${JSON.stringify(name)} is not known`);
    }
    if (found.has(name)) refuse(`the parameter ${JSON.stringify(name)} stands there twice`);
    found.set(name, equals < 0 ? "" : decode(item.slice(equals + 1), refuse));
  }
  return Object.fromEntries(found);
}

/** Percent-decoding; unlike in forms, "+" is a plus sign. */
function decode(text: string, refuse: Refuse): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return refuse(`${JSON.stringify(text)} is not percent-encoded UTF-8`);
  }
}

/** The URI of what `parseNbdUri` returned; parsing it again gives the same. */
export function formatNbdUri(uri: NbdUri): string {
  const { address } = uri;
  const scheme = `nbd${uri.tls ? "s" : ""}${address.transport === "unix" ? "+unix" : ""}`;
  const query = Object.entries(uri.parameters).map(([name, value]) => [name, value] as const);
  const items = address.transport === "unix" ? [["socket", address.path] as const, ...query] : query;
  const search = items.map(([name, value]) => `${encodeURIComponent(name)}=${encodePath(value)}`).join("&");
  return `${scheme}://${formatAuthority(uri)}/${encodePath(uri.exportName)}${search && `?${search}`}`;
}

function formatAuthority({ address, username }: NbdUri): string {
  const user = username === undefined ? "" : `${encodeURIComponent(username)}@`;
  if (address.transport === "unix") return user;
  const host = address.host.includes(":") ? `[${address.host}]` : encodeURIComponent(address.host);
  return `${user}${host}${address.port === NBD_DEFAULT_PORT ? "" : `:${address.port}`}`;
}

/** Slashes need no encoding in a path or a query, and read better without. */
function encodePath(text: string): string {
  return encodeURIComponent(text).replaceAll("%2F", "/");
}
