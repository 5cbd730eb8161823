import { spawn } from "node:child_process";
import { once } from "node:events";
import { createServer, type Socket } from "node:net";
import { TestMonitor } from "../support/monitor.js";
import { temporaryDirectory } from "../support/temporary.js";

/** A running qemu-storage-daemon. */
export interface Daemon extends AsyncDisposable {
  readonly pid: number;
}

/** Starts qemu-storage-daemon and waits until its monitor serves, so all of its arguments are done. */
export async function startDaemon(args: readonly string[]): Promise<Daemon> {
  const home = await temporaryDirectory("qsd-");
  const server = createServer();
  server.listen(home.file("m"));
  await once(server, "listening");
  const monitorArguments = ["--chardev", `socket,id=m,path=${home.file("m")}`, "--monitor", "chardev=m"];
  const child = spawn(
    "setpriv",
    ["--pdeathsig", "KILL", "qemu-storage-daemon", ...args, ...monitorArguments],
    {
      stdio: ["ignore", "inherit", "inherit"],
    },
  );
  const ended = once(child, "close");
  const connected = once(server, "connection") as Promise<[Socket]>;
  const failed = ended.then(() => Promise.reject(new Error("qemu-storage-daemon ended")));
  const [socket] = await Promise.race([connected, failed]);
  failed.catch(() => undefined);
  const monitor = await TestMonitor.over(socket);
  server.close();
  return {
    pid: child.pid ?? 0,
    async [Symbol.asyncDispose]() {
      monitor.close();
      child.kill("SIGKILL");
      await ended;
      await home[Symbol.asyncDispose]();
    },
  };
}
