import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { uptime } from "node:os";
import { describe, expect, it } from "vitest";
import { judgeOnAnyHost, judgeOnThisHost, thisHost, thisProcess, type ProcessOnHost } from "./index.js";

/** A number that no process can have. */
const NO_PID = 2 ** 22 + 1;

async function here(): Promise<ProcessOnHost> {
  return { ...(await thisProcess()), ...(await thisHost()) };
}

describe("judgeOnThisHost()", () => {
  it("tells a process from one that had its pid before, also before a reboot", async () => {
    const own = await thisProcess();
    expect(await judgeOnThisHost(own, own)).toBe("alive");
    expect(await judgeOnThisHost({ ...own, startTime: "1" }, own)).toBe("gone");
    expect(await judgeOnThisHost({ ...own, bootId: "another" }, own)).toBe("gone");
    expect(await judgeOnThisHost({ ...own, pid: NO_PID }, own)).toBe("gone");
  });

  it("does not guess about another pid namespace, nor without what the system does not tell", async () => {
    const own = await thisProcess();
    expect(await judgeOnThisHost({ ...own, pidNamespace: "pid:[1]" }, own)).toBe("unknown");
    for (const field of ["startTime", "bootId", "pidNamespace"] as const) {
      expect(await judgeOnThisHost({ ...own, [field]: null }, own)).toBe("unknown");
    }
    expect(await judgeOnThisHost({ ...own, bootId: "x" }, { ...own, bootId: null })).toBe("unknown");
  });

  it("takes a zombie for gone", async () => {
    // A shell that becomes another program never waits for its child.
    const parent = spawn("sh", ["-c", "sleep 0 & echo $!; exec sleep 60"], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    const [line] = (await once(parent.stdout, "data")) as [Buffer];
    const pid = Number(line.toString());
    const state = async (): Promise<string> =>
      (await readFile(`/proc/${pid}/stat`, "utf8")).split(") ")[1] ?? "";
    while (!(await state()).startsWith("Z")) await new Promise(setImmediate);
    const startTime = (await state()).split(" ")[19] ?? "";
    const own = await thisProcess();
    expect(await judgeOnThisHost({ ...own, pid, startTime }, own)).toBe("gone");
    parent.kill("SIGKILL");
    await once(parent, "close");
  });
});

describe("judgeOnAnyHost()", () => {
  const now = new Date();
  const beforeBoot = new Date(Date.now() - uptime() * 1000 - 60_000);

  it("knows this process, and that it cannot know those of other hosts", async () => {
    const own = await here();
    expect(await judgeOnAnyHost(own, own, now)).toBe("alive");
    expect(await judgeOnAnyHost({ ...own, pid: NO_PID }, own, now)).toBe("gone");
    expect(await judgeOnAnyHost({ ...own, startTime: "1" }, own, now)).toBe("gone");
    expect(await judgeOnAnyHost({ ...own, bootId: "x", host: "x" }, own, now)).toBe("unknown");
    expect(await judgeOnAnyHost({ ...own, machineId: "x" }, own, now)).toBe("unknown");
    expect(await judgeOnAnyHost({ ...own, machineId: null }, { ...own, machineId: null }, now)).toBe(
      "unknown",
    );
    expect(await judgeOnAnyHost({ ...own, bootId: null }, own, now)).toBe("unknown");
    expect(await judgeOnAnyHost({ ...own, pidNamespace: "x" }, own, now)).toBe("unknown");
    expect(await judgeOnAnyHost({ ...own, startTime: null }, own, now)).toBe("unknown");
  });

  it("tells this host before a restart from a clone of it, which has given a sign of life since", async () => {
    const own = await here();
    expect(await judgeOnAnyHost({ ...own, bootId: "x" }, own, beforeBoot)).toBe("gone");
    expect(await judgeOnAnyHost({ ...own, bootId: "x" }, own, now)).toBe("unknown");
    expect(await judgeOnAnyHost({ ...own, bootId: "x", host: "x" }, own, beforeBoot)).toBe("unknown");
  });
});
