import { spawn } from "node:child_process";

/** Where Debian keeps the programs that tests use, for the message when one is missing. */
const DEBIAN_PACKAGES: Readonly<Record<string, string>> = {
  "qemu-system-x86_64": "qemu-system-x86",
  "qemu-img": "qemu-utils",
  "qemu-io": "qemu-utils",
  "qemu-nbd": "qemu-utils",
  "qemu-storage-daemon": "qemu-system-common",
  nbdinfo: "libnbd-bin",
  nbdcopy: "libnbd-bin",
  nbdkit: "nbdkit",
  "mkfs.ext4": "e2fsprogs",
  filefrag: "e2fsprogs",
  "mkfs.xfs": "xfsprogs",
  "mkfs.btrfs": "btrfs-progs",
  openssl: "openssl",
  prlimit: "util-linux",
  setpriv: "util-linux",
  stdbuf: "coreutils",
};

/** What a program that ended left behind. */
export interface ToolResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  /** Milliseconds until the program is killed and the run fails; default 60,000. */
  readonly deadline?: number;
  /** Exit codes that are answers and not failures; default 0 alone. */
  readonly codes?: readonly number[];
  readonly cwd?: string;
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Written to its standard input, which is closed behind it. */
  readonly input?: string | Uint8Array;
}

/**
 * Runs a program to its end.
 *
 * @throws when it is not installed (naming the Debian package), does not end in time, ends by a signal, or
 *   with a code that is not in `codes`; the message has the command line and what it wrote to stderr
 */
export async function run(
  command: string,
  args: readonly string[],
  options: RunOptions = {},
): Promise<ToolResult> {
  const { deadline = 60_000, codes = [0], cwd, env, input } = options;
  const line = [command, ...args].join(" ");
  const child = spawn(command, args, {
    stdio: ["pipe", "pipe", "pipe"],
    timeout: deadline,
    killSignal: "SIGKILL",
    ...(cwd === undefined ? {} : { cwd }),
    ...(env === undefined ? {} : { env: { ...process.env, ...env } }),
  });
  const stdout: Buffer[] = [];
  const stderr: Buffer[] = [];
  child.stdout.on("data", (chunk: Buffer) => stdout.push(chunk));
  child.stderr.on("data", (chunk: Buffer) => stderr.push(chunk));
  // A program may end without reading its input: its exit code tells whether that was a failure.
  child.stdin.on("error", () => undefined);
  child.stdin.end(input);

  const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
    child.once("error", (error) => reject(spawnError(command, error)));
    child.once("close", (...ended) => resolve(ended));
  });
  const result = {
    code: code ?? -1,
    stdout: Buffer.concat(stdout).toString("utf8"),
    stderr: Buffer.concat(stderr).toString("utf8"),
  };
  if (signal !== null) {
    throw new Error(`\`${line}\` ended by ${signal} (deadline ${deadline / 1000} s)\n${result.stderr}`);
  }
  if (!codes.includes(result.code)) {
    throw new Error(`\`${line}\` ended with code ${result.code}\n${result.stdout}${result.stderr}`);
  }
  return result;
}

/** The error for a program that could not be started: a missing tool fails a test, it never skips it. */
export function spawnError(command: string, error: Error): Error {
  if (!("code" in error) || error.code !== "ENOENT") return error;
  const debian = DEBIAN_PACKAGES[command] ?? command;
  return new Error(`${command} is not installed: run scripts/setup.sh, or \`apt-get install ${debian}\``, {
    cause: error,
  });
}
