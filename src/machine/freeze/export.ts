import { rmdirSync, rmSync } from "node:fs";
import { chown, mkdtemp, rmdir, stat } from "node:fs/promises";
import { once } from "node:events";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import type { IoOptions } from "../../bytes/index.js";
import { TidemarkError } from "../../errors/index.js";
import { formatRunObject, newRunId } from "../../point/index.js";
import { LONGEST_SOCKET_PATH, QmpCommandError, type QmpAddress, type QmpClient } from "../../qmp/index.js";
import { ForeignServerError } from "../errors.js";

const SOCKET = "nbd.sock";
const DIRECTORY_PREFIX = "tm-";
/** Characters that mkdtemp() makes a name unique with. */
const UNIQUE_LENGTH = 6;

/**
 * Makes a directory for the NBD socket that QEMU can use and strangers cannot: mode 0700, owned by the owner
 * of the QMP socket. (QEMU makes its socket accessible to all; and a stranger's unfinished handshake would
 * hang some builds of QEMU when the server is stopped.)
 *
 * @param parent where to make it; default beside the QMP socket, else the system's directory for temporary files
 * @returns the path that the socket shall have
 */
export async function prepareSocketPath(
  run: string,
  address: QmpAddress,
  parent: string | undefined,
): Promise<string> {
  const parents =
    parent !== undefined
      ? [parent]
      : [...(address.transport === "unix" ? [dirname(address.path)] : []), tmpdir()];
  const fitting = parents.filter(hasRoomForSocket);
  let failure: unknown;
  for (const directory of fitting) {
    try {
      return join(await makeDirectory(directory, run, address), SOCKET);
    } catch (error) {
      // The next place is tried; when all fail, this is what the error tells.
      failure = error;
    }
  }
  throw new TidemarkError(
    "TM_SOCKET_DIRECTORY",
    fitting.length === 0
      ? `Cannot make a directory for the NBD socket in ${parents.join(" or ")}: a socket's path may have ${LONGEST_SOCKET_PATH} bytes`
      : `Cannot make a directory for the NBD socket: ${(failure as Error).message}`,
    { cause: failure, hint: "Name a directory with --socket-dir that QEMU's user can reach" },
  );
}

/** Whether a path is that of a run's NBD socket: only such are ever removed on a state file's word. */
export function isSocketPath(path: string, run: string): boolean {
  return basename(path) === SOCKET && basename(dirname(path)).startsWith(`${DIRECTORY_PREFIX}${run}-`);
}

/** Removes the socket's directory. QEMU removed the socket itself when it stopped the server. */
export function removeSocketPath(path: string): void {
  rmSync(path, { force: true });
  try {
    rmdirSync(dirname(path));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
}

/**
 * Starts QEMU's NBD server on a socket of ours.
 *
 * @throws {ForeignServerError} when another program's server runs already
 */
export async function startServer(qmp: QmpClient, path: string, maxConnections: number): Promise<void> {
  const addr = { type: "unix", data: { path } } as const;
  try {
    await qmp.execute("nbd-server-start", { addr, "max-connections": maxConnections });
  } catch (error) {
    if (!(error instanceof QmpCommandError)) throw error;
    // There is no query for a server without exports, and all errors are of one class: the text has to do.
    if (/already running/i.test(error.description)) {
      throw new ForeignServerError("it serves nothing at present", { cause: error });
    }
    throw new TidemarkError(
      "TM_NBD_SERVER",
      `Cannot start QEMU's NBD server at ${path}: ${error.description}`,
      {
        cause: error,
        hint: "QEMU's user must be able to reach that directory; name another with --socket-dir",
      },
    );
  }
}

/**
 * Whether somebody listens at a socket of ours: then that is the server which was started there. There is no
 * query for it, and stopping the server without knowing could hit another program's.
 */
export async function isListening(path: string): Promise<boolean> {
  const socket = connect({ path });
  try {
    await once(socket, "connect");
    return true;
  } catch (error) {
    if (["ENOENT", "ECONNREFUSED"].includes((error as NodeJS.ErrnoException).code ?? "")) return false;
    throw error;
  } finally {
    socket.destroy();
  }
}

/**
 * Exports a disk's scratch node, with the bitmap of what changed, and with the depth of what is allocated where
 * overlays lie on top of that.
 *
 * @returns the export's name
 */
export async function exportDisk(
  qmp: QmpClient,
  run: string,
  number: number,
  { hasChanges, hasOverlays }: { readonly hasChanges: boolean; readonly hasOverlays: boolean },
  options: IoOptions = {},
): Promise<{ readonly exportName: string; readonly dirtyContext: string | undefined }> {
  const name = (kind: "exp" | "scr" | "tmp"): string => formatRunObject({ run, disk: number, kind });
  const common = {
    type: "nbd",
    id: name("exp"),
    "node-name": name("scr"),
    name: name("exp"),
    writable: false,
  } as const;
  // A bare name is looked for down the backing chain, so it is found on the disk's own node (5.2 and later).
  const changes = hasChanges ? { bitmaps: [name("tmp")] } : {};
  const depth = hasOverlays ? { "allocation-depth": true } : {};
  await qmp.execute("block-export-add", { ...common, ...changes, ...depth }, options);
  return {
    exportName: name("exp"),
    dirtyContext: hasChanges ? `qemu:dirty-bitmap:${name("tmp")}` : undefined,
  };
}

/** Whether the path of an NBD socket in a directory made below `parent` is one that a socket can have. */
export function hasRoomForSocket(parent: string): boolean {
  // The ids of all runs have one length.
  const path = join(parent, `${DIRECTORY_PREFIX}${newRunId()}-`, SOCKET);
  return Buffer.byteLength(path) + UNIQUE_LENGTH <= LONGEST_SOCKET_PATH;
}

async function makeDirectory(parent: string, run: string, address: QmpAddress): Promise<string> {
  const made = await mkdtemp(join(parent, `${DIRECTORY_PREFIX}${run}-`));
  if (address.transport !== "unix") return made;
  try {
    const { uid, gid } = await stat(address.path);
    if (uid !== process.geteuid?.()) await chown(made, uid, gid);
    return made;
  } catch (error) {
    await rmdir(made);
    throw error;
  }
}
