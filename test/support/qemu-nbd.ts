import { spawn } from "node:child_process";
import { once } from "node:events";
import { access } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import type { NbdAddress } from "../../src/nbd/index.js";
import { spawnError } from "./tools.js";

/** A `qemu-nbd` that serves one image, read-only, until disposed. */
export interface QemuNbd extends AsyncDisposable {
  readonly address: NbdAddress;
}

/**
 * Serves an image on a unix socket with `qemu-nbd`, for any number of clients.
 *
 * @param options.bitmap a persistent bitmap to be served as `qemu:dirty-bitmap:<name>`
 * @throws when it ends before it listens
 */
export async function serveImage(
  image: { readonly path: string; readonly format: "raw" | "qcow2" },
  socket: string,
  options: { readonly exportName?: string; readonly bitmap?: string } = {},
): Promise<QemuNbd> {
  const child = spawn(
    "qemu-nbd",
    [
      ...["-r", "-t", "-e", "64", "-f", image.format, "-x", options.exportName ?? "disk", "-k", socket],
      ...(options.bitmap === undefined ? [] : ["-B", options.bitmap]),
      image.path,
    ],
    { stdio: ["ignore", "ignore", "pipe"] },
  );
  let stderr = "";
  child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  const failed = new Promise<never>((_resolve, reject) => {
    child.once("error", (error) => reject(spawnError("qemu-nbd", error)));
    child.once("exit", (code) => reject(new Error(`qemu-nbd ended with code ${code ?? ""}: ${stderr}`)));
  });
  failed.catch(() => undefined);
  // qemu-nbd has no way to say that it listens but its socket.
  const listening = async (): Promise<void> => {
    for (let tries = 0; tries < 1000; tries += 1) {
      if (
        await access(socket).then(
          () => true,
          () => false,
        )
      )
        return;
      await sleep(10);
    }
    throw new Error(`qemu-nbd does not listen on ${socket}: ${stderr}`);
  };
  await Promise.race([listening(), failed]);
  return {
    address: { transport: "unix", path: socket },
    async [Symbol.asyncDispose]() {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const ended = once(child, "exit");
      child.kill("SIGKILL");
      await ended;
    },
  };
}
