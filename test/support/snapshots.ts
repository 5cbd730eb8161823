// External snapshots and what is done with them, as an administrator or another program does it.
import { createImage } from "./image.js";
import type { TestMachine } from "./qemu.js";

/** Takes a snapshot as the simplest of tools do: nothing but a new overlay, which gets no bitmap. */
export async function snapshotSync(
  machine: TestMachine,
  node: string,
  file: string,
  overlay: string,
): Promise<void> {
  await machine.monitor.execute("blockdev-snapshot-sync", {
    "node-name": node,
    "snapshot-file": file,
    "snapshot-node-name": overlay,
  });
}

/** Takes a snapshot with an overlay made beforehand, as libvirt does. */
export async function blockdevSnapshot(
  machine: TestMachine,
  node: string,
  backing: { readonly path: string; readonly format: "qcow2" | "raw" },
  file: string,
  overlay: string,
  size: number,
): Promise<void> {
  await createImage(file, "qcow2", size, { backing });
  const options = { driver: "qcow2", "node-name": overlay, discard: "unmap", backing: null };
  await machine.monitor.execute("blockdev-add", { ...options, file: { driver: "file", filename: file } });
  await machine.monitor.execute("blockdev-snapshot", { node, overlay });
}

/** Commits overlays into an image below them, to the end. The topmost of all is replaced by that image. */
export async function blockCommit(
  machine: TestMachine,
  arguments_: { readonly device: string; readonly "top-node"?: string; readonly "base-node": string },
): Promise<void> {
  const isActive = arguments_["top-node"] === undefined;
  const of = (data: Readonly<Record<string, unknown>>): boolean => data["device"] === "commit";
  const { monitor } = machine;
  const ended = monitor.nextEvent("BLOCK_JOB_COMPLETED", of);
  const ready = isActive ? monitor.nextEvent("BLOCK_JOB_READY", of) : undefined;
  await monitor.execute("block-commit", { "job-id": "commit", ...arguments_ });
  if (ready !== undefined) {
    await ready;
    await monitor.execute("job-complete", { id: "commit" });
  }
  failIfAny((await ended).data);
}

/** Copies what images below hold into a node, to the end; without `base-node` all of them. */
export async function blockStream(
  machine: TestMachine,
  arguments_: { readonly device: string; readonly "base-node"?: string },
): Promise<void> {
  const ended = machine.monitor.nextEvent("BLOCK_JOB_COMPLETED", (data) => data["device"] === "stream");
  await machine.monitor.execute("block-stream", { "job-id": "stream", ...arguments_ });
  failIfAny((await ended).data);
}

function failIfAny({ error, device }: Readonly<Record<string, unknown>>): void {
  if (error !== undefined) throw new Error(`Job ${String(device)} failed: ${JSON.stringify(error)}`);
}
