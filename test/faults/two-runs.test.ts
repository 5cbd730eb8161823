import { writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { startMachine } from "../support/qemu.js";
import { pointOf, Rig } from "../support/rig.js";
import { run } from "../support/tools.js";

const MiB = 1024 * 1024;
const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
const UUID = "11111111-2222-4333-8444-555555555555";

let rig: Rig;
let image: string;

beforeAll(async () => {
  rig = await Rig.create();
  image = await rig.image("a.qcow2", "qcow2", 24 * MiB);
  await rig.start([{ path: image, format: "qcow2", id: "vda" }], {
    guest: "none",
    monitors: 3,
    deadline: 400_000,
  });
  await rig.machine.qemuIo("vda", "write -P 1 0 20M");
}, 60_000);

afterAll(async () => {
  await rig[Symbol.asyncDispose]();
});

/** Runs tidemark as another host would: another machine-id, another run directory. */
async function onOtherHost(
  args: readonly string[],
): Promise<{ code: number; stderr: string; stdout: string }> {
  const id = rig.directory.file("machine-id");
  await writeFile(id, "f".repeat(32));
  const flags = process.getuid?.() === 0 ? "-m" : "-rm";
  const script = 'mount --bind "$1" /etc/machine-id; shift; exec "$@"';
  return await run("unshare", [flags, "sh", "-eu", "-c", script, "sh", id, process.execPath, MAIN, ...args], {
    env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run-of-other-host") },
    codes: [0, 1, 2, 5],
  });
}

describe("two agents of two hosts with one repository", () => {
  it("the second gets exit 5 for the same machine's points, and the first one's point is right", async () => {
    await using other = await startMachine({
      disks: [{ path: await rig.image("other.qcow2", "qcow2", MiB), format: "qcow2" }],
      guest: "none",
    });
    const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") };
    await using first = startTidemark(rig.backupArguments(["--bandwidth", "4MiB/s"]), { env });
    await first.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);

    const into = ["--repo", rig.repository, "--machine", "vm"];
    const second = await onOtherHost(["backup", ...into, "--qmp", other.qmp]);
    expect(second).toMatchObject({ code: 5, stderr: expect.stringMatching(/process \d+ on host/) as string });

    // Whoever looks through another monitor, without knowing the runs of the first host, is told so.
    const monitor = rig.machine.qmpSockets[1] ?? "";
    const unsure = await onOtherHost(["cleanup", "--qmp", monitor, "--dry-run"]);
    expect(unsure).toMatchObject({ code: 0, stdout: expect.stringContaining("may be alive") as string });
    const status = await onOtherHost(["status", "--qmp", monitor]);
    expect(status.stdout).toContain("which may be alive");
    expect(await onOtherHost(["cleanup", "--qmp", monitor])).toMatchObject({ code: 5 });

    const result = await first.ended;
    expect(result.code).toBe(0);
    const point = pointOf(result.events());
    const file = `${rig.repository}/vm/${point.id}/vda.qcow2`;
    const reference = rig.proxy.referenceOf(image, rig.proxy.freezeOf(point.id));
    await run("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", file, reference]);
  });
});

describe("a mistyped --machine", () => {
  it("warns that the repository knows the machine under another name, and only then", async () => {
    const known = await rig.tidemark(rig.backupArguments());
    expect(known.events().filter(({ event }) => event === "warning")).toEqual([]);
    const args = rig.backupArguments();
    args[args.indexOf("vm")] = "mv";
    for (const warned of [true, false]) {
      const events = (await rig.tidemark(args)).events();
      const warnings = events.filter(({ event }) => event === "warning").map(({ message }) => message);
      expect(warnings).toEqual(
        warned
          ? [
              `The repository has points of this machine (UUID ${UUID}) under the name "vm": "mv" begins a new chain`,
            ]
          : [],
      );
    }
  });
});
