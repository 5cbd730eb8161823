import { cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { createServer, type Server } from "node:net";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { runTidemark, startTidemark, type CliResult } from "../support/cli.js";
import { guardsOf } from "../support/guards.js";
import { compareImages } from "../support/image.js";
import { TestMonitor } from "../support/monitor.js";
import { Rig, type PointView } from "../support/rig.js";
import { startMachine } from "../support/qemu.js";
import { run } from "../support/tools.js";
import { treeOf, worldOf } from "./world.js";

const MiB = 1024 * 1024;
const DEADLINE = 400_000;

let rig: Rig;
let vda: string;
let vdb: string;
/** Three points, "one" to "three", of which the last two are increments. */
let points: PointView[];

beforeAll(async () => {
  rig = await Rig.create();
  vda = await rig.image("a.qcow2", "qcow2", 8 * MiB);
  vdb = await rig.image("b.raw", "raw", MiB);
  const machine = await rig.start(
    [
      { path: vda, format: "qcow2", id: "vda" },
      { path: vdb, format: "raw", id: "vdb" },
    ],
    { guest: "none", monitors: 3, deadline: DEADLINE },
  );
  points = [];
  for (const [index, name] of ["one", "two", "three"].entries()) {
    await machine.qemuIo("vda", `write -P ${index + 1} ${index}M 512k`);
    points.push(await rig.backup(["--name", name]));
  }
  await machine.qemuIo("vda", "write -P 77 5M 512k");
}, 60_000);

afterAll(async () => {
  await rig[Symbol.asyncDispose]();
});

/** Arguments of a backup whose error is for people. */
function backup(...extra: string[]): string[] {
  return rig.backupArguments(extra).filter((argument) => argument !== "--json");
}

/** A backup of the machine into another repository, or of another machine: an option that is given twice counts as given last. */
const into = (repository: string, ...extra: string[]): string[] => backup("--repo", repository, ...extra);

/** Runs what must fail, and makes sure that it changed nothing. */
async function refused(args: readonly string[]): Promise<CliResult> {
  const before = await worldOf(rig);
  const result = await rig.run(args);
  expect(await worldOf(rig), `after tidemark ${args.join(" ")}`).toEqual(before);
  return result;
}

/** A server on a socket of its own that greets, or says nothing. */
async function stranger(name: string, greeting?: string): Promise<{ path: string; server: Server }> {
  const path = rig.directory.file(name);
  const server = createServer((socket) => {
    socket.on("error", () => undefined);
    if (greeting !== undefined) socket.write(greeting);
  });
  server.listen(path);
  await once(server, "listening");
  return { path, server };
}

type Case = readonly [title: string, code: number, says: RegExp, args: () => string[]];

const USAGE: readonly Case[] = [
  ["an unknown command", 2, /unknown command 'bakup'. Did you mean backup\?/, () => ["bakup"]],
  ["an unknown option", 2, /unknown option '--frobnicate'/, () => backup("--frobnicate")],
  ["an option before the command", 2, /stand behind the command/, () => ["--quiet", "list"]],
  ["too many arguments", 2, /too many arguments/, () => backup("surplus")],
  ["no machine", 2, /--machine/, () => ["backup", "--qmp", rig.proxy.socket]],
  ["no monitor", 2, /--qmp/, () => ["backup", "--machine", "vm", "--repo", rig.repository]],
  ["a machine's name that is a path", 2, /"..\/..\/etc" cannot be/, () => backup("--machine", "../../etc")],
  ["an empty name of a machine", 2, /"" cannot be/, () => backup("--machine", "")],
  ["a machine's name of 65 letters", 2, /1 to 64/, () => backup("--machine", "a".repeat(65))],
  ["a level of 0", 2, /--level.*1 to 19/, () => backup("--level", "0")],
  ["a level of 20", 2, /--level.*1 to 19/, () => backup("--level", "20")],
  ["a level that is no whole number", 2, /--level/, () => backup("--level", "3.5")],
  ["a bandwidth that is no rate", 2, /--bandwidth.*100MiB\/s/, () => backup("--bandwidth", "fast")],
  ["a bandwidth of nothing", 2, /--bandwidth/, () => backup("--bandwidth", "0")],
  ["no workers", 2, /--workers.*1 to 64/, () => backup("--workers", "0")],
  ["a negative number of workers", 2, /--workers/, () => backup("--workers=-1")],
  ["a disk that is not there", 2, /"vdz"\n.*vda = node0, vdb = node1/, () => backup("--disk", "vdz")],
  ["two disks with one name", 2, /"x"/, () => backup("--disk", "vda=x", "--disk", "vdb=x")],
  ["one disk twice", 2, /same disk/, () => backup("--disk", "vda", "--disk", "node0=b")],
  ["a disk's name that is a path", 2, /"..\/x" cannot be/, () => backup("--disk", "vda=../x")],
  ["the name of another point", 2, /has the name "two" already/, () => backup("--name", "two")],
  ["a point's name that means another", 2, /cannot be the name/, () => backup("--name", "latest~1")],
  ["an empty name of a point", 2, /cannot be the name/, () => backup("--name", "")],
  ["control characters in a name", 2, /control characters/, () => backup("--name", "a\u001bb")],
  ["an endless description", 2, /4096/, () => backup("--description", "x".repeat(5000))],
  ["a scratch directory that is not there", 1, /--scratch/, () => backup("--scratch", "/nonexistent")],
  ["a scratch without room", 1, /--scratch-limit/, () => backup("--scratch-limit", "1")],
  ["no directory for sockets", 1, /--socket-dir/, () => backup("--socket-dir", "/nonexistent")],
  ["no monitor at that path", 4, /no such socket/, () => backup("--qmp", "/nonexistent")],
  ["a file in place of a monitor", 4, /no socket/, () => backup("--qmp", vda)],
  ["a port where nobody listens", 4, /nothing listens/, () => backup("--qmp", "tcp:127.0.0.1:1")],
  ["an empty monitor", 2, /no QMP address/, () => backup("--qmp", "")],
  ["a repository that is not there", 4, /tidemark init/, () => into("/nonexistent")],
  ["a repository below a file", 4, /no repository at/, () => into(`${vda}/x`)],
  ["a directory that is no repository", 4, /find a repository/, () => into(rig.directory.path)],
  ["a bucket, which cannot be used yet", 2, /s3:\/\//, () => into("s3://bucket/prefix")],
  ["a repository that is there", 2, /one already/, () => ["init", "--repo", rig.repository]],
  ["other things in the directory", 2, /is there/, () => ["init", "--repo", rig.directory.path]],
  ["a file where a repository is to be", 2, /not a directory/, () => ["init", "--repo", vda]],
  ["a machine that has no points", 4, /"nobody"/, () => ["list", "nobody", "--repo", rig.repository]],
  ["a point that is not there", 4, /"zero"/, () => ["show", "vm@zero", "--repo", rig.repository]],
  [
    "a repository without its machine",
    2,
    /--machine/,
    () => ["status", "--qmp", rig.proxy.socket, "--repo", rig.repository],
  ],
  [
    "a directory that cannot be made",
    2,
    /not a directory/,
    () => ["restore", "vm", "--repo", rig.repository, "--to-dir", vda],
  ],
];

describe("tidemark on bad input", () => {
  it.each(USAGE)("refuses %s with exit %i, says why, and changes nothing", async (_, code, says, args) => {
    const result = await refused(args());
    expect(result.stderr).toMatch(says);
    expect(result.stderr).toMatch(
      /^tidemark: [^\n]+\n {2}[^\n]+\n$|^tidemark: [^\n]+\n$|^vda: .*\ntidemark: /s,
    );
    expect(result.stderr).not.toContain("    at ");
    expect({ code: result.code, stdout: result.stdout }).toEqual({ code, stdout: "" });
  });

  it("tells a server that does not speak QMP from a monitor, and a monitor that is taken within 5 s", async () => {
    const ssh = await stranger("ssh", "SSH-2.0-OpenSSH_9.2\r\n");
    const notQmp = await refused(backup("--qmp", ssh.path));
    expect(notQmp.stderr).toMatch(/QMP/);
    expect(notQmp.code).toBe(1);
    ssh.server.close();

    const socket = rig.machine.qmpSockets[1] ?? "";
    const other = await TestMonitor.connect(socket);
    try {
      for (const args of [
        backup("--qmp", socket),
        ["status", "--qmp", socket],
        ["cleanup", "--qmp", socket],
      ]) {
        const started = performance.now();
        const busy = await refused(args);
        expect(performance.now() - started).toBeLessThan(9000);
        // Who waited and left still fills the queue: the third one does not even get in.
        expect(busy.stderr).toMatch(/other clients? holds? this monitor.*\n.*second monitor/);
        expect(busy.code).toBe(5);
      }
    } finally {
      other.close();
    }
  });

  it("refuses a repository of a newer format in every command", async () => {
    const newer = rig.directory.file("newer");
    await cp(rig.repository, newer, { recursive: true });
    const file = `${newer}/tidemark.json`;
    const content = JSON.parse(await readFile(file, "utf8")) as object;
    await writeFile(file, JSON.stringify({ ...content, format: 2 }));
    const before = await treeOf(newer);
    const target = rig.directory.file("none.raw");
    for (const args of [
      into(newer),
      ["list", "--repo", newer],
      ["show", "vm", "--repo", newer],
      ["restore", "vm", "--repo", newer, "--disk", "vda", "--to", target],
    ]) {
      const result = await refused(args);
      expect(result.stderr).toMatch(/format version 2.*up to 1\n.*version of tidemark/s);
      expect(result.code).toBe(1);
    }
    expect(await treeOf(newer)).toEqual(before);
  });
});

describe("a manifest that cannot be read", () => {
  /** Copies the repository and replaces the manifest of one point. */
  async function broken(name: string, index: number, change: (text: string) => string): Promise<string> {
    const copy = rig.directory.file(name);
    await cp(rig.repository, copy, { recursive: true });
    const file = `${copy}/vm/${points[index]?.id ?? ""}/point.json`;
    await writeFile(file, change(await readFile(file, "utf8")));
    return copy;
  }
  const half = (text: string): string => text.slice(0, text.length / 2);
  const idOf = (index: number): string => points[index]?.id ?? "";

  it("half written, of a point in the middle: exit 6 names it, its neighbours can be shown and restored", async () => {
    const repo = await broken("half-middle", 1, half);
    const before = await treeOf(repo);
    const key = `vm/${idOf(1)}/point.json`;
    const list = await rig.run(["list", "--repo", repo, "--json"]);
    expect((JSON.parse(list.stdout) as PointView[]).map(({ id }) => id)).toEqual([idOf(0), idOf(2)]);
    expect(JSON.parse(list.stderr)).toMatchObject({
      event: "error",
      code: "TM_MANIFEST_DAMAGED",
      exitCode: 6,
    });
    expect(list.code).toBe(6);

    const to = (name: string): string[] => [
      "--repo",
      repo,
      "--disk",
      "vda",
      "--to",
      rig.directory.file(name),
    ];
    for (const args of [
      ["show", `vm@${idOf(1)}`, "--repo", repo],
      ["restore", `vm@${idOf(1)}`, ...to("middle.raw")],
      // Its chain goes through the point.
      ["restore", `vm@${idOf(2)}`, ...to("top.raw")],
    ]) {
      const result = await rig.run(args);
      expect(result.stderr).toContain(key);
      expect({ code: result.code, stdout: result.stdout }).toEqual({ code: 6, stdout: "" });
    }
    await rig.tidemark(["show", `vm@${idOf(2)}`, "--repo", repo]);
    await rig.tidemark(["restore", "vm@one", ...to("bottom.raw")]);
    const reference = rig.reference(points[0] as PointView, vda);
    expect(await compareImages(rig.directory.file("bottom.raw"), reference)).toBe("identical");
    expect(await treeOf(repo)).toEqual(before);
  });

  it.each([
    ["half written", half, 6, /Cannot read manifest/, []],
    [
      "of a newer format",
      (text: string) => text.replace(/"format": *1/, '"format": 2'),
      1,
      /format version 2/,
      // Older ones can be gone on from; who knows what a newer tidemark means by it.
      ["backup"],
    ],
  ] as const)(
    "%s, of the newest point: nothing that could mean it goes on without it",
    async (title, change, code, says, more) => {
      const repo = await broken(`newest ${title}`, 2, change);
      const before = await treeOf(repo);
      const target = ["--disk", "vda", "--to", rig.directory.file("newest.raw")];
      for (const args of [
        ...more.map(() => into(repo)),
        ["list", "--repo", repo],
        ["show", "vm", "--repo", repo],
        ["show", `vm@${idOf(2)}`, "--repo", repo],
        ["restore", "vm", "--repo", repo, ...target],
      ]) {
        const result = await refused(args);
        expect(result.stderr).toMatch(says);
        expect(result.stderr).toContain(idOf(2));
        expect(result.code).toBe(code);
      }
      expect(await treeOf(repo)).toEqual(before);
      await rig.tidemark(["show", "vm@two", "--repo", repo]);
    },
  );
});

describe("what another program does in QEMU", () => {
  it("an NBD server of its own: exit 5, and it goes on serving", async () => {
    const { monitor } = rig.machine;
    const path = rig.directory.file("theirs.sock");
    await monitor.execute("nbd-server-start", { addr: { type: "unix", data: { path } } });
    try {
      const idle = await rig.run(backup());
      expect(idle.stderr).toMatch(/NBD server of another program.*\n.*Wait until/);
      expect(idle.code).toBe(5);

      await monitor.execute("block-export-add", {
        id: "theirs",
        type: "nbd",
        "node-name": "node1",
        name: "x",
      });
      const serving = await refused(backup());
      expect(serving.stderr).toMatch(/it serves export "theirs"/);
      expect(serving.code).toBe(5);
      expect((await refused(["cleanup", "--qmp", rig.proxy.socket])).code).toBe(5);
      const { stdout } = await run("nbdinfo", ["--size", `nbd+unix:///x?socket=${path}`]);
      expect(Number(stdout)).toBe(MiB);
    } finally {
      await monitor.execute("nbd-server-stop");
    }
  });

  it.each(["blockdev-backup", "blockdev-mirror"])("a %s job: exit 5, and it goes on", async (command) => {
    const { monitor } = rig.machine;
    const file = await rig.image(`${command}.qcow2`, "qcow2", 8 * MiB);
    await monitor.execute("blockdev-add", {
      driver: "qcow2",
      "node-name": "theirs",
      file: { driver: "file", filename: file },
    });
    const sync = command === "blockdev-backup" ? "none" : "full";
    await monitor.execute(command, { "job-id": "job-theirs", device: "node0", target: "theirs", sync });
    try {
      if (sync === "full") {
        const isReady = async (): Promise<boolean> =>
          (await monitor.execute<{ status: string }[]>("query-jobs")).every(
            ({ status }) => status === "ready",
          );
        await expect.poll(isReady, { timeout: 10_000 }).toBe(true);
      }
      const result = await refused(backup());
      expect(result.stderr).toMatch(/job "job-theirs" of another program/);
      expect(result.code).toBe(5);
    } finally {
      const gone = monitor.nextEvent(
        "JOB_STATUS_CHANGE",
        ({ id, status }) => id === "job-theirs" && status === "null",
      );
      await monitor.execute("block-job-cancel", { device: "job-theirs", force: true });
      await gone;
      await monitor.execute("blockdev-del", { "node-name": "theirs" });
    }
  });
});

describe("what another run of ours does", () => {
  it("the same machine, by its monitor or another one, or its points alone: exit 5, and that run goes on", async () => {
    await rig.machine.qemuIo("vda", "write -P 88 0 8M");
    const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") };
    await using first = startTidemark(rig.backupArguments(["--bandwidth", "512KiB/s"]), { env });
    await first.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);

    await using other = await startMachine({
      disks: [{ path: await rig.image("other.qcow2", "qcow2", MiB), format: "qcow2" }],
      guest: "none",
    });
    const second = rig.machine.qmpSockets[1] ?? "";
    const elsewhere = rig.directory.file("elsewhere");
    await rig.tidemark(["init", "--repo", elsewhere]);
    const cases: [string[], RegExp][] = [
      [backup(), /run/],
      [backup("--qmp", second), /run [0-9a-f]{8} of process \d+/],
      [into(elsewhere, "--qmp", second), /run [0-9a-f]{8} of process \d+/],
      [["cleanup", "--qmp", second], /run [0-9a-f]{8} of process \d+/],
      [backup("--qmp", other.qmp), /process \d+ on host/],
    ];
    for (const [args, says] of cases) {
      const result = await rig.run(args);
      expect(result.stderr).toMatch(says);
      expect(result.code).toBe(5);
    }
    const status = await rig.tidemark(["status", "--qmp", second, "--json"]);
    expect(status.json()).toMatchObject({ leftovers: [] });
    expect(await first.ended).toMatchObject({ code: 0 });
  });
});

describe("disks in iothreads", () => {
  it("are backed up as any others, with a guard at their side", async () => {
    await using threaded = await Rig.create();
    const image = await threaded.image("t.qcow2", "qcow2", 2 * MiB);
    await threaded.start([{ path: image, format: "qcow2", id: "vda", iothread: true }], { guest: "none" });
    await threaded.machine.qemuIo("vda", "write -P 9 1M 64k");
    let guards = 0;
    const counting = threaded.proxy.onCommand("transaction", async () => {
      guards += (await guardsOf(threaded)).length;
      return undefined;
    });
    const point = await threaded.backup();
    expect(guards).toBeGreaterThan(0);
    counting.remove();
    expect(await guardsOf(threaded)).toEqual([]);
    expect(await threaded.verify(point, { vda: image })).toEqual({ vda: "identical" });
  });
});

describe("a repository that cannot be written", () => {
  const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
  /** Mounts are made in a namespace of the command's own, and end with it. */
  async function inNamespace(
    script: string,
    args: readonly string[],
  ): Promise<{ code: number; stderr: string }> {
    const flags = process.getuid?.() === 0 ? "-m" : "-rm";
    const words = [rig.repository, process.execPath, MAIN, ...args];
    return await run("unshare", [flags, "sh", "-eu", "-c", script, "sh", ...words], {
      env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") },
      codes: [0, 1, 2, 5, 6, 99],
    });
  }

  it.each([
    [
      "read-only",
      `repo=$1; shift; mount --bind "$repo" "$repo"; mount -o remount,ro,bind "$repo"; exec "$@"`,
      /read-only\n/,
    ],
    [
      "full",
      `repo=$1; shift; copy="$repo.copy"; cp -a "$repo" "$copy"
       used=$(du -sk "$copy" | cut -f1)
       mount -t tmpfs -o "size=$((used + 3000))k" none "$repo"; cp -a "$copy/." "$repo"
       code=0; "$@" || code=$?
       diff -r "$copy" "$repo" >&2 || exit 99
       rm -r "$copy"; exit $code`,
      /no space is left\n/,
    ],
  ])(
    "%s: exit 1, no trace of the attempt, and the next backup is an increment and right",
    async (_, script, says) => {
      const before = await treeOf(rig.repository);
      const noise = rig.directory.file("noise");
      await run("dd", ["if=/dev/urandom", `of=${noise}`, "bs=1M", "count=6"]);
      await rig.machine.qemuIo("vda", `write -s ${noise} 1M 6M`);
      const failed = await inNamespace(script, backup());
      expect(failed.stderr).toMatch(says);
      expect(failed.code).toBe(1);
      expect(await treeOf(rig.repository)).toEqual(before);
      const { qemu, files } = await worldOf(rig);
      expect(qemu.filter((line) => /tm-|^job|^export/.test(line))).toEqual([]);
      expect(files).toEqual([]);

      const point = await rig.backup();
      expect(point.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental"]);
      expect(point.disks[0]?.dirtyBytes).toBeGreaterThanOrEqual(6 * MiB);
      expect(await rig.verify(point, { vda, vdb })).toEqual({ vda: "identical", vdb: "identical" });
    },
  );
});

describe("what the command line prints", () => {
  const COMMANDS = ["init", "backup", "list", "show", "restore", "status", "cleanup"];

  it.each(COMMANDS)("%s --help has examples and exit codes", async (command) => {
    const help = await runTidemark([command, "--help"]);
    expect(help).toMatchObject({ code: 0, stderr: "" });
    expect(help.stdout).toMatch(new RegExp(`^Usage: tidemark ${command} `));
    expect(help.stdout).toMatch(new RegExp(`\\nEXAMPLES\\n {2}(.*)tidemark ${command}`));
    expect(help.stdout).toMatch(/\nEXIT STATUS\n(.*\n)+$/);
    expect((await runTidemark(["help", command])).stdout).toBe(help.stdout);
  });

  it("the overview and the version, each ending in a newline", async () => {
    const help = await runTidemark(["--help"]);
    for (const command of COMMANDS) expect(help.stdout).toMatch(new RegExp(`\\n {2}${command} +\\w`));
    expect(help.stdout).toMatch(/\nEXIT STATUS\n(.*\n)+$/);
    for (const args of [[], ["help"]]) {
      expect(await runTidemark(args)).toMatchObject({ code: 0, stdout: help.stdout, stderr: "" });
    }
    const { version } = JSON.parse(
      await readFile(new URL("../../package.json", import.meta.url), "utf8"),
    ) as { version: string };
    expect(await runTidemark(["--version"])).toMatchObject({ code: 0, stdout: `${version}\n`, stderr: "" });
  });

  it("--json: an error of a reporting command on standard error, of a long-running one as its last line", async () => {
    const error = (code: string, exitCode: number): object => ({
      event: "error",
      code,
      message: expect.any(String) as string,
      hint: expect.any(String) as string,
      exitCode,
    });
    for (const args of [
      ["list", "--repo", "/nonexistent"],
      ["show", "vm", "--repo", "/nonexistent"],
      ["init", "--repo", rig.repository],
      ["status", "--qmp", "/nonexistent"],
      ["cleanup", "--qmp", "/nonexistent"],
    ]) {
      const result = await refused([...args, "--json"]);
      expect(result.stdout).toBe("");
      expect(result.stderr).toMatch(/^[^\n]+\n$/);
      const code = { init: "TM_USAGE", status: "TM_QMP_NOT_FOUND", cleanup: "TM_QMP_NOT_FOUND" }[
        args[0] ?? ""
      ];
      expect(JSON.parse(result.stderr)).toEqual(
        error(code ?? "TM_REPOSITORY_NOT_FOUND", code === "TM_USAGE" ? 2 : 4),
      );
    }
    for (const args of [into("/nonexistent"), ["restore", "vm", "--repo", "/nonexistent", "--to", "x"]]) {
      const result = await refused([...args, "--json"]);
      expect(result.stderr).toBe("");
      expect(result.events()).toEqual([error("TM_REPOSITORY_NOT_FOUND", 4)]);
    }
  });

  it("--quiet: nothing at all when it works, the error when it does not", async () => {
    const repo = rig.directory.file("quiet");
    await mkdir(repo);
    const there = ["--repo", repo];
    const qmp = ["--qmp", rig.proxy.socket];
    for (const args of [
      ["init", ...there],
      into(repo),
      ["list", ...there],
      ["show", "vm", ...there],
      ["restore", "vm", ...there, "--to-dir", rig.directory.file("quiet-restored")],
      ["status", ...qmp, "--machine", "vm", ...there],
      ["cleanup", ...qmp, "--machine", "vm", ...there],
    ]) {
      const result = await rig.run([...args, "--quiet"]);
      expect(result, args.join(" ")).toMatchObject({ code: 0, stdout: "", stderr: "" });
    }
    const failed = await refused(["show", "vm@zero", ...there, "--quiet"]);
    expect(failed.stderr).toMatch(/^tidemark: /);
  });
});
