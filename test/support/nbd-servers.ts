import { spawn } from "node:child_process";
import { existsSync, watch } from "node:fs";
import { createServer } from "node:net";
import { once } from "node:events";
import type { NbdAddress } from "../../src/nbd/index.js";
import { temporaryDirectory } from "./temporary.js";
import { spawnError } from "./tools.js";

/** A real NBD server, a child of the test. */
export interface RealNbdServer extends AsyncDisposable {
  readonly address: NbdAddress;
  /** For nbdinfo and nbdcopy: the URI of one of its exports. */
  uri(exportName: string): string;
  readonly pid: number;
}

export interface ServerPlace {
  readonly transport?: "unix" | "tcp";
}

/** Where a server is to listen: the arguments are made from it. */
export interface Listening {
  readonly address: NbdAddress;
  readonly pidFile: string;
}

/**
 * Starts a server and waits for its pid file, which all three servers write when they listen.
 *
 * @throws when it ends before, with what it wrote to stderr
 */
async function startServer(
  command: string,
  place: ServerPlace,
  argumentsFor: (listening: Listening) => readonly string[],
): Promise<RealNbdServer> {
  const directory = await temporaryDirectory("tm-nbd-");
  const pidFile = directory.file("pid");
  const address: NbdAddress =
    place.transport === "tcp"
      ? { transport: "tcp", host: "127.0.0.1", port: await freePort() }
      : { transport: "unix", path: directory.file("s") };
  const child = spawn(command, argumentsFor({ address, pidFile }), { stdio: ["ignore", "ignore", "pipe"] });
  const stderr: Buffer[] = [];
  child.stderr.on("data", (chunk: Buffer) => stderr.push(chunk));
  const exited = new Promise<void>((resolve) => child.once("close", () => resolve()));

  const watcher = watch(directory.path);
  try {
    await new Promise<void>((resolve, reject) => {
      child.once("error", (error) => reject(spawnError(command, error)));
      child.once("close", () => {
        reject(new Error(`${command} ended: ${Buffer.concat(stderr).toString("utf8")}`));
      });
      watcher.on("change", () => existsSync(pidFile) && resolve());
      if (existsSync(pidFile)) resolve();
    });
  } finally {
    watcher.close();
  }
  return {
    address,
    pid: child.pid ?? 0,
    uri: (name) =>
      address.transport === "unix"
        ? `nbd+unix:///${encodeURIComponent(name)}?socket=${address.path}`
        : `nbd://${address.host}:${address.port}/${encodeURIComponent(name)}`,
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await exited;
      await directory[Symbol.asyncDispose]();
    },
  };
}

/** A TCP port of the loopback interface on which nobody listened a moment ago. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

/** `qemu-nbd` on one image, for up to 16 clients. */
export function startQemuNbd(
  options: ServerPlace & {
    readonly image: string;
    readonly format: "raw" | "qcow2";
    readonly exportName: string;
    readonly bitmaps?: readonly string[];
    readonly writable?: boolean;
    /** Further options. */
    readonly extra?: readonly string[];
  },
): Promise<RealNbdServer> {
  const { image, format, exportName, bitmaps = [], writable = false, extra = [] } = options;
  return startServer("qemu-nbd", options, ({ address, pidFile }) => [
    ...(writable ? ["--discard=unmap"] : ["--read-only"]),
    ...["--persistent", "--shared=16", `--format=${format}`, `--pid-file=${pidFile}`],
    ...["--export-name", exportName, ...bitmaps.map((bitmap) => `--bitmap=${bitmap}`)],
    ...extra,
    ...(address.transport === "unix"
      ? ["--socket", address.path]
      : ["--bind", address.host, "--port", String(address.port)]),
    image,
  ]);
}

/** One export of `qemu-storage-daemon`. */
export interface DaemonExport {
  readonly image: string;
  readonly format: "raw" | "qcow2";
  readonly exportName: string;
  readonly bitmaps?: readonly string[];
  readonly writable?: boolean;
  /** Offer qemu:allocation-depth. */
  readonly allocationDepth?: boolean;
}

/** `qemu-storage-daemon` with several exports. */
export function startStorageDaemon(
  options: ServerPlace & { readonly exports: readonly DaemonExport[] },
): Promise<RealNbdServer> {
  return startServer("qemu-storage-daemon", options, ({ address, pidFile }) => [
    ...["--pidfile", pidFile, "--nbd-server"],
    address.transport === "unix"
      ? `addr.type=unix,addr.path=${address.path}`
      : `addr.type=inet,addr.host=${address.host},addr.port=${address.port}`,
    ...options.exports.flatMap(
      ({ image, format, exportName, bitmaps = [], writable = false, allocationDepth = false }, index) => [
        "--blockdev",
        `driver=${format},node-name=d${index},read-only=${writable ? "off,discard=unmap" : "on"},file.driver=file,file.filename=${image}`,
        "--export",
        [
          `type=nbd,id=e${index},node-name=d${index},name=${exportName},writable=${writable ? "on" : "off"}`,
          `allocation-depth=${allocationDepth ? "on" : "off"}`,
          ...bitmaps.map((bitmap, number) => `bitmaps.${number}=${bitmap}`),
        ].join(","),
      ],
    ),
  ]);
}

/** `nbdkit` with a plugin and its parameters; filters come as `--filter=…` among them. */
export function startNbdkit(
  options: ServerPlace & { readonly parameters: readonly string[] },
): Promise<RealNbdServer> {
  return startServer("nbdkit", options, ({ address, pidFile }) => [
    ...["--foreground", "--pidfile", pidFile],
    ...(address.transport === "unix"
      ? ["--unix", address.path]
      : ["--ipaddr", address.host, "--port", String(address.port)]),
    ...options.parameters,
  ]);
}
