import { once } from "node:events";
import { rm, stat } from "node:fs/promises";
import { connect } from "node:net";
import { describe, expect, it } from "vitest";
import { MiB } from "../../src/bytes/index.js";
import { withDeadline } from "../../src/flow/index.js";
import { readCounter, readTrail } from "../support/guest.js";
import { compareImages, createImage, imageInfo, toRaw } from "../support/image.js";
import { TestMonitor } from "../support/monitor.js";
import { startMachine, type TestDisk, type TestMachine } from "../support/qemu.js";
import { QmpProxy } from "../support/qmp-proxy.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const SIZE = 32 * MiB;

/** What a freeze names a disk by: `device` of blockdev-backup, and the node of its bitmaps. */
interface Frozen {
  readonly device: string;
  readonly size: number;
}

/** The freeze of a first backup, by hand: a scratch under each disk, then one transaction. */
async function freeze(
  client: TestMonitor,
  directory: TemporaryDirectory,
  disks: readonly Frozen[],
  run: string,
): Promise<void> {
  for (const [index, { device, size }] of disks.entries()) {
    const filename = await createImage(directory.file(`${run}-${index}.scratch`), "qcow2", size);
    await client.execute("blockdev-add", {
      driver: "qcow2",
      "node-name": `${run}-${index}-scr`,
      backing: await nodeOf(client, device),
      file: { driver: "file", filename },
    });
  }
  const add = disks.map(({ device }, index) => ({
    type: "block-dirty-bitmap-add",
    data: { node: device, name: `${run}-${index}`, persistent: false, granularity: 65536 },
  }));
  const backup = disks.map(({ device }, index) => ({
    type: "blockdev-backup",
    data: {
      "job-id": `${run}-${index}-job`,
      device,
      target: `${run}-${index}-scr`,
      sync: "none",
      "auto-dismiss": false,
    },
  }));
  await client.execute("transaction", { actions: [...add, ...backup] });
}

async function nodeOf(client: TestMonitor, device: string): Promise<string> {
  const devices =
    await client.execute<{ device: string; inserted?: { "node-name": string } }[]>("query-block");
  return devices.find((one) => one.device === device)?.inserted?.["node-name"] ?? device;
}

/** Reads the frozen points with nbdcopy; the machine is stopped, so that an iothread survives the disconnect. */
async function readFrozen(
  machine: TestMachine,
  client: TestMonitor,
  directory: TemporaryDirectory,
  count: number,
  run_: string,
): Promise<string[]> {
  const socket = directory.file(`${run_}.nbd`);
  await client.execute("nbd-server-start", { addr: { type: "unix", data: { path: socket } } });
  const files: string[] = [];
  await machine.monitor.execute("stop");
  for (let index = 0; index < count; index += 1) {
    const name = `${run_}-${index}`;
    await client.execute("block-export-add", {
      type: "nbd",
      id: `${name}-exp`,
      "node-name": `${name}-scr`,
      name,
    });
    const file = await createImage(directory.file(`${name}.frozen`), "raw", SIZE);
    await run("nbdcopy", [`nbd+unix:///${name}?socket=${socket}`, file]);
    files.push(file);
    const deleted = client.nextEvent("BLOCK_EXPORT_DELETED");
    await client.execute("block-export-del", { id: `${name}-exp`, mode: "hard" });
    await deleted;
  }
  await client.execute("nbd-server-stop");
  await machine.monitor.execute("cont");
  return files;
}

async function thaw(client: TestMonitor, count: number, run_: string): Promise<void> {
  for (let index = 0; index < count; index += 1) {
    const id = `${run_}-${index}-job`;
    const concluded = client.nextEvent(
      "JOB_STATUS_CHANGE",
      (data) => data["id"] === id && data["status"] === "concluded",
    );
    await client.execute("job-cancel", { id });
    await concluded;
    await client.execute("job-dismiss", { id });
    await client.execute("blockdev-del", { "node-name": `${run_}-${index}-scr` });
  }
}

describe("QmpProxy", () => {
  const kinds: { title: string; disks: Omit<TestDisk, "path">[] }[] = [
    {
      title: "three disks: qcow2 and raw, by node name and drive id",
      disks: [
        { format: "qcow2" },
        { format: "raw", style: "drive" },
        { format: "qcow2", style: "drive", bus: "virtio-scsi" },
      ],
    },
    {
      title: "two disks on iothreads",
      disks: [
        { format: "qcow2", iothread: true },
        { format: "raw", iothread: true },
      ],
    },
  ];
  it.each(kinds)("keeps what $title held at each freeze", async ({ disks: kind }) => {
    await using directory = await temporaryDirectory();
    const disks: TestDisk[] = [];
    for (const [index, disk] of kind.entries()) {
      const path = await createImage(directory.file(`disk${index}.img`), disk.format, SIZE);
      disks.push({ ...disk, path });
    }
    await using machine = await startMachine({ guest: "counter", disks });
    await using proxy = await QmpProxy.start(machine.qmp, { directory: directory.file("references") });
    const client = await TestMonitor.connect(proxy.socket);
    const frozen = machine.disks.map(({ node, drive }) => ({ device: node ?? drive!, size: SIZE }));

    for (const run of ["one", "two"]) {
      await machine.waitForGuestWriting(100);
      await freeze(client, directory, frozen, run);
      await machine.waitForGuestWriting(100);
      const files = await readFrozen(machine, client, directory, disks.length, run);
      await thaw(client, disks.length, run);

      const references = proxy.freezeOf(`${run}-0`).references;
      expect(references.map(({ source, format }) => ({ source, format }))).toEqual(
        disks.map(({ path, format }) => ({ source: path, format })),
      );
      const counters: number[] = [];
      for (const [index, { file, source }] of references.entries()) {
        expect(await compareImages(rawImage(file), rawImage(files[index]!))).toBe("identical");
        const now = await toRaw(source, disks[index]!.format, directory.file("now.raw"), { live: true });
        expect(await compareImages(rawImage(file), rawImage(now))).toContain("Content mismatch");
        counters.push(await readTrail(file));
        expect(proxy.referenceOf(source)).toBe(file);
      }
      expect(Math.max(...counters) - Math.min(...counters)).toBeLessThanOrEqual(1);
    }
    expect(proxy.freezes).toHaveLength(2);
    expect(await readCounter(proxy.freezes[1]!.references[0]!.file)).toBeGreaterThan(
      await readCounter(proxy.freezes[0]!.references[0]!.file),
    );
    // The stop was the proxy's own business: two by it, two by this test.
    expect(client.events.filter(({ event }) => event === "STOP" || event === "RESUME")).toHaveLength(4);
    expect(machine.monitor.events.filter(({ event }) => event === "STOP")).toHaveLength(4);
    expect(machine.monitor.events.filter(({ event }) => event === "RESUME")).toHaveLength(4);
    client.close();
    expect(await machine.quit()).toEqual({ code: 0, signal: null });
  });

  it("passes on the error of a freeze that fails, copies nothing, and the guest goes on", async () => {
    await using setting = await oneDisk({ guest: "counter" });
    const { machine, proxy, client, directory } = setting;
    const scratch = directory.file("none");
    await expect(
      client.execute("transaction", {
        actions: [
          { type: "block-dirty-bitmap-add", data: { node: "node0", name: "b" } },
          { type: "blockdev-backup", data: { device: "node0", target: scratch, sync: "none" } },
        ],
      }),
    ).rejects.toThrow("none");
    expect(proxy.freezes).toEqual([]);
    expect(proxy.commands.at(-1)).toMatchObject({ name: "transaction", reply: { error: { class: /./ } } });
    await machine.waitForGuestWriting();
  });

  it("leaves a paused machine paused, and its reference has what was written and not flushed", async () => {
    await using setting = await oneDisk({ guest: "none" });
    const { machine, proxy, client, directory, path } = setting;
    await machine.qemuIo(0, "write -P 65 3M 64k");
    await freeze(client, directory, [{ device: "node0", size: SIZE }], "run");
    await machine.qemuIo(0, "write -P 66 3M 64k");
    expect(await machine.monitor.execute("query-status")).toMatchObject({ status: "prelaunch" });
    const expected = await createImage(directory.file("expected.raw"), "raw", SIZE);
    await run("qemu-io", ["-f", "raw", "-c", "write -P 65 3M 64k", expected]);
    expect(await compareImages(rawImage(expected), rawImage(proxy.referenceOf(path)))).toBe("identical");
  });

  it("lets the machine go on, and finishes the reference, when its client dies in the freeze", async () => {
    await using setting = await oneDisk({ guest: "counter" });
    const { machine, proxy, client, directory, path } = setting;
    const stopped = machine.monitor.nextEvent("STOP");
    const resumed = machine.monitor.nextEvent("RESUME");
    const lost = expect(freeze(client, directory, [{ device: "node0", size: SIZE }], "run")).rejects.toThrow(
      "closed its monitor",
    );
    await stopped;
    client.close();
    await lost;
    await resumed;
    await machine.waitForGuestWriting();
    expect((await stat(proxy.referenceOf(path))).size).toBe(SIZE);
    expect(await machine.monitor.execute("query-jobs")).toMatchObject([{ id: "run-0-job" }]);
  });

  it("onCommand() injects errors before and after QEMU, holds commands, and counts what it did", async () => {
    await using setting = await oneDisk({ guest: "none" });
    const { machine, proxy, client } = setting;
    const add = (name: string): Promise<unknown> =>
      client.execute("block-dirty-bitmap-add", { node: "node0", name });
    const bitmaps = async (): Promise<unknown> => {
      const [node] = await machine.monitor.execute<{ "dirty-bitmaps"?: { name: string }[] }[]>(
        "query-named-block-nodes",
        { flat: true },
      );
      return (node?.["dirty-bitmaps"] ?? []).map(({ name }) => name);
    };
    const before = proxy.onCommand("block-dirty-bitmap-add", () => ({ error: "not today" }));
    await expect(add("a")).rejects.toThrow("not today");
    expect(await bitmaps()).toEqual([]);
    before.remove();

    const after = proxy.onCommand(
      "block-dirty-bitmap-add",
      (command, reply) => {
        expect(reply).toMatchObject({ return: {} });
        return command.arguments["name"] === "b"
          ? { error: "too late", class: "CommandNotFound" }
          : undefined;
      },
      "after",
    );
    await expect(add("b")).rejects.toMatchObject({ errorClass: "CommandNotFound" });
    expect(await bitmaps()).toEqual(["b"]);

    const held = proxy.onCommand("*", async ({ name, occurrence }) => {
      if (name !== "block-dirty-bitmap-add" || occurrence !== 3) return undefined;
      await machine.monitor.execute("block-dirty-bitmap-remove", { node: "node0", name: "b" });
      return undefined;
    });
    await add("c");
    expect(await bitmaps()).toEqual(["c"]);
    expect([before.fired, after.fired, held.fired]).toEqual([1, 2, 1]);
    expect(proxy.commands.map(({ name }) => name)).toEqual([
      "qmp_capabilities",
      "block-dirty-bitmap-add",
      "block-dirty-bitmap-add",
      "block-dirty-bitmap-add",
    ]);
  });

  it("onCommand() keeps an answer back with silence, and cuts the client off with disconnect", async () => {
    await using setting = await oneDisk({ guest: "none" });
    const { proxy, client } = setting;
    const silent = proxy.onCommand("query-version", () => "silence");
    const unanswered = client.execute("query-version");
    // Later commands are answered, that one is not.
    expect(await client.execute("query-status")).toMatchObject({ status: "prelaunch" });
    const cut = proxy.onCommand("query-kvm", () => "disconnect");
    await expect(client.execute("query-kvm")).rejects.toThrow("closed its monitor");
    await expect(unanswered).rejects.toThrow("closed its monitor");
    expect([silent.fired, cut.fired]).toEqual([1, 1]);
  });

  it("lets a second client wait ungreeted until the first has gone", async () => {
    await using setting = await oneDisk({ guest: "none" });
    const { proxy, client } = setting;
    const second = connect(proxy.socket);
    const greeting = once(second, "data") as Promise<[Buffer]>;
    await client.execute("query-status");
    expect(second.bytesRead).toBe(0);
    client.close();
    expect((await greeting)[0].toString()).toContain('"QMP"');
    second.destroy();
  });

  it("is a plain wire: ids of every type, several commands in one packet, bad JSON and 0xFF", async () => {
    await using setting = await oneDisk({ guest: "none" });
    const { proxy, client } = setting;
    client.close();
    const socket = connect(proxy.socket);
    let text = "";
    const until = (mark: string): Promise<void> =>
      withDeadline(
        new Promise((resolve) => {
          const look = (chunk: Buffer): void => {
            text += chunk.toString("latin1");
            if (!text.includes(mark)) return;
            socket.off("data", look);
            resolve();
          };
          socket.on("data", look);
        }),
        5000,
        `Wait for ${mark}`,
      );
    await until('"QMP"');
    text = "";
    socket.write(
      '{"execute":"qmp_capabilities"}\n{"execute":"query-kvm","id":{"a":[1,null]}}\n{"execute":"query-kvm","id":"last"}\n',
    );
    await until('"last"');
    const replies = text
      .trim()
      .split("\r\n")
      .map((line) => JSON.parse(line) as { id?: unknown });
    expect(replies.map(({ id }) => id)).toEqual([undefined, { a: [1, null] }, "last"]);
    text = "";
    socket.write("{ this is no JSON }\n");
    await until("JSON parse error");
    text = "";
    socket.write(Buffer.from('{"execute": "half\xff{"execute":"query-kvm","id":7}\n', "latin1"));
    await until('"id": 7');
    text = "";
    socket.write(Buffer.from('\xff{"execute":"query-kvm","id":8}\n', "latin1"));
    await until('"id": 8');
    expect(proxy.commands.at(-1)).toMatchObject({ name: "query-kvm", reply: { id: 8 } });
    socket.destroy();
  });

  it("says what went wrong, and the machine goes on, when a disk cannot be copied", async () => {
    await using setting = await oneDisk({ guest: "counter" });
    const { machine, proxy, client, directory } = setting;
    await rm(directory.file("references"), { recursive: true });
    await expect(freeze(client, directory, [{ device: "node0", size: SIZE }], "run")).rejects.toThrow(
      "closed",
    );
    expect(() => proxy.freezes).toThrow("qemu-img convert");
    await machine.waitForGuestWriting();
  });

  it("records freezes without touching the machine when it has no directory", async () => {
    await using directory = await temporaryDirectory();
    const path = await createImage(directory.file("a.qcow2"), "qcow2", SIZE);
    await using machine = await startMachine({ guest: "counter", disks: [{ path, format: "qcow2" }] });
    await using proxy = await QmpProxy.start(machine.qmp);
    const client = await TestMonitor.connect(proxy.socket);
    await freeze(client, directory, [{ device: "node0", size: SIZE }], "run");
    expect(proxy.freezes).toEqual([{ bitmaps: ["run-0"], references: [] }]);
    expect(machine.monitor.events.filter(({ event }) => event === "STOP")).toEqual([]);
    expect(await imageInfo(path, "qcow2")).toMatchObject({ "virtual-size": SIZE });
    client.close();
  });
});

interface Setting extends AsyncDisposable {
  readonly directory: TemporaryDirectory;
  readonly path: string;
  readonly machine: TestMachine;
  readonly proxy: QmpProxy;
  readonly client: TestMonitor;
}

/** A machine with one qcow2 disk `node0`, a proxy before it, and a client of the proxy. */
async function oneDisk(options: { readonly guest: "counter" | "none" }): Promise<Setting> {
  const directory = await temporaryDirectory();
  const path = await createImage(directory.file("a.qcow2"), "qcow2", SIZE);
  const machine = await startMachine({ ...options, disks: [{ path, format: "qcow2" }] });
  const proxy = await QmpProxy.start(machine.qmp, { directory: directory.file("references") });
  const client = await TestMonitor.connect(proxy.socket);
  return {
    ...{ directory, path, machine, proxy, client },
    async [Symbol.asyncDispose]() {
      client.close();
      await proxy[Symbol.asyncDispose]();
      await machine[Symbol.asyncDispose]();
      await directory[Symbol.asyncDispose]();
    },
  };
}

function rawImage(path: string): { path: string; format: "raw" } {
  return { path, format: "raw" };
}
