import { describe, expect, it } from "vitest";
import {
  parseQmpAddress,
  QmpBusyError,
  QmpClient,
  QmpClosedError,
  QmpProtocolError,
} from "../../src/qmp/index.js";
import { createImage } from "../support/image.js";
import { startMachine } from "../support/qemu.js";
import { temporaryDirectory } from "../support/temporary.js";

describe("QmpClient", () => {
  it("probes the schema of a real QEMU", async () => {
    await using vm = await startMachine({ disks: [], guest: "none" });
    await using client = await QmpClient.connect(parseQmpAddress(vm.qmp));
    const schema = await client.schema();
    const action = (value: string) => ({ command: "transaction", argument: "actions.type", value });
    const driver = (value: string) => ({ command: "blockdev-add", argument: "driver", value });
    expect(schema.has(action("blockdev-backup"))).toBe(true);
    expect(schema.has(action("blockdev-add"))).toBe(false);
    expect(schema.has(driver("copy-before-write"))).toBe(true);
    expect(schema.has(driver("no-such-driver"))).toBe(false);
    expect(schema.has({ command: "nbd-server-start", argument: "max-connections" })).toBe(true);
    expect(schema.has({ command: "nbd-server-start", argument: "no-such-argument" })).toBe(false);
    expect(schema.has({ event: "BLOCK_EXPORT_DELETED" })).toBe(true);
    const { major, minor } = client.greeting.version;
    expect(schema.exportsBitmapsByNode).toBe(major > 7 || (major === 7 && minor >= 1));
  });

  it("keeps replies and events apart while both come thick and fast", async () => {
    await using vm = await startMachine({ disks: [], guest: "idle" });
    await using client = await QmpClient.connect(parseQmpAddress(vm.qmp));
    using watch = client.watch(({ name }) => name === "STOP" || name === "RESUME");
    const rounds = 50;
    const replies = await Promise.all(
      Array.from({ length: rounds }, () => [
        client.call("stop"),
        client.execute("query-status"),
        client.call("cont"),
      ]).flat(),
    );
    expect(replies.filter((reply) => reply === "paused")).toHaveLength(rounds);
    for (let round = 0; round < rounds; round += 1) {
      expect((await watch.next({ timeoutMs: 5000 })).name).toBe("STOP");
      expect((await watch.next({ timeoutMs: 5000 })).name).toBe("RESUME");
    }
  });

  it("is told that the monitor is busy, within six seconds, and gets it when the other leaves", async () => {
    await using vm = await startMachine({ disks: [], guest: "none" });
    const first = await QmpClient.connect(parseQmpAddress(vm.qmp));
    const started = performance.now();
    await expect(QmpClient.connect(parseQmpAddress(vm.qmp))).rejects.toThrow(QmpBusyError);
    expect(performance.now() - started).toBeLessThan(6000);
    await first.close();
    await using second = await QmpClient.connect(parseQmpAddress(vm.qmp));
    expect(await second.execute("query-status")).toBe("prelaunch");
  });

  it("ends every wait when QEMU is killed", async () => {
    await using vm = await startMachine({ disks: [], guest: "none" });
    const client = await QmpClient.connect(parseQmpAddress(vm.qmp));
    using watch = client.watch(() => true);
    const waiting = watch.next();
    await Promise.all([expect(waiting).rejects.toThrow(QmpClosedError), vm.kill()]);
    expect(await client.closed).toBeInstanceOf(QmpClosedError);
  });

  it("talks over TCP, and to a monitor that prints for people", async () => {
    await using directory = await temporaryDirectory();
    const path = directory.file("pretty");
    await using vm = await startMachine({
      disks: [],
      guest: "none",
      extraArguments: [
        ...[
          "-chardev",
          `socket,id=p,path=${path},server=on,wait=off`,
          "-mon",
          "chardev=p,mode=control,pretty=on",
        ],
        ...[
          "-chardev",
          "socket,id=t,host=127.0.0.1,port=0,server=on,wait=off",
          "-mon",
          "chardev=t,mode=control",
        ],
      ],
    });
    expect(vm.stderr).toBe("");
    await using pretty = await QmpClient.connect(parseQmpAddress(path));
    const [chardev] = ((await pretty.call("query-chardev")) as { label: string; filename: string }[]).filter(
      ({ label }) => label === "t",
    );
    const port = /:(\d+),/.exec(chardev!.filename)![1]!;
    await using client = await QmpClient.connect(parseQmpAddress(`127.0.0.1:${port}`));
    expect(client.greeting).toEqual(pretty.greeting);
  });

  it("refuses a human monitor and an NBD server by what they say", async () => {
    await using directory = await temporaryDirectory();
    const [hmp, nbd] = [directory.file("hmp"), directory.file("nbd")];
    const path = await createImage(directory.file("disk"), "qcow2", 1024 * 1024);
    await using vm = await startMachine({
      disks: [{ path, format: "qcow2" }],
      guest: "none",
      extraArguments: [
        "-chardev",
        `socket,id=h,path=${hmp},server=on,wait=off`,
        "-mon",
        "chardev=h,mode=readline",
      ],
    });
    await expect(QmpClient.connect(parseQmpAddress(hmp))).rejects.toThrow(QmpProtocolError);
    await vm.monitor.execute("nbd-server-start", { addr: { type: "unix", data: { path: nbd } } });
    await expect(QmpClient.connect(parseQmpAddress(nbd))).rejects.toThrow(/NBDMAGIC/);
  });
});
