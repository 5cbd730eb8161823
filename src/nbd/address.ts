/** Where an NBD server listens. */
export type NbdAddress =
  | { readonly transport: "unix"; readonly path: string }
  | { readonly transport: "tcp"; readonly host: string; readonly port: number };

/** An address for messages: "unix:/run/vm.sock", "tcp:host:10809". */
export function describeAddress(address: NbdAddress): string {
  if (address.transport === "unix") return `unix:${address.path.replace(/^\0/, "@")}`;
  const host = address.host.includes(":") ? `[${address.host}]` : address.host;
  return `tcp:${host}:${address.port}`;
}
