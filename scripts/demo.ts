/**
 * npm run demo: a live machine that never stops writing, three backups of it, every point restored and compared
 * with what the disks held at that moment. Everything below is real: QEMU, the command line, qemu-img.
 */
import { mkdir } from "node:fs/promises";
import { styleText } from "node:util";
import { tidemark } from "../test/support/cli.js";
import { readTrail } from "../test/support/guest.js";
import { compareImages, createImage, toRaw } from "../test/support/image.js";
import { startMachine } from "../test/support/qemu.js";
import { QmpProxy } from "../test/support/qmp-proxy.js";
import { temporaryDirectory } from "../test/support/temporary.js";

const MiB = 1024 * 1024;

interface Point {
  readonly id: string;
  readonly disks: readonly { readonly name: string; readonly kind: string; readonly image: string }[];
}

const started = performance.now();
await using directory = await temporaryDirectory("tm-demo-");
const repository = directory.file("repository");
const env = { TIDEMARK_RUNTIME_DIR: directory.file("run") };

heading("A machine that never stops writing");
const disks = [
  { id: "root", path: directory.file("root.qcow2"), format: "qcow2", size: 32 * MiB },
  { id: "data", path: directory.file("data.qcow2"), format: "qcow2", size: 24 * MiB },
  { id: "logs", path: directory.file("logs.raw"), format: "raw", size: 20 * MiB },
] as const;
for (const { path, format, size } of disks) await createImage(path, format, size);
// A quiet guest, so that an increment is smaller than the disk.
await using machine = await startMachine({ disks, guest: { stepsPerTick: 3 }, name: "demo" });
await machine.waitForGuestWriting(100);
say(
  `QEMU runs as process ${machine.pid}, with two qcow2 disks and a raw one. Its guest is a boot sector that`,
);
say(
  "writes a rising number to each disk in turn, some fifty times a second, and leaves a trail over 16 MiB.",
);
say(
  "So a restored disk tells by itself whether a single block is stale, and whether all disks stopped at once.",
);

// Between tidemark and QEMU stands a proxy that copies the disks while the freeze is held: the reference.
const references = directory.file("references");
await mkdir(references);
await using proxy = await QmpProxy.start(machine.qmp, { directory: references });

heading("A full backup and two increments, while it writes");
await command(["init", "--repo", repository]);
const points: Point[] = [];
for (const name of ["monday", "tuesday", "wednesday"]) {
  await command(["backup", "--machine", "demo", "--qmp", proxy.socket, "--repo", repository, "--name", name]);
  points.push(JSON.parse(await quietly(["show", "demo", "--repo", repository, "--json"])) as Point);
  await machine.waitForGuestWriting(60);
}

heading("The chain");
await command(["list", "--repo", repository]);
await command(["status", "--machine", "demo", "--qmp", proxy.socket, "--repo", repository]);

heading("Every point, restored and compared with what the disks held at its freeze");
let comparisons = 0;
for (const point of points) {
  const target = directory.file(`restored-${point.id}`);
  await quietly(["restore", `demo@${point.id}`, "--repo", repository, "--to-dir", target]);
  for (const [index, { path }] of disks.entries()) {
    const disk = point.disks[index];
    if (disk === undefined) throw new Error(`point ${point.id} lacks a disk`);
    const reference = { path: proxy.referenceOf(path, proxy.freezeOf(point.id)), format: "raw" } as const;
    const restored = `${target}/${disk.name}.raw`;
    const image = `${repository}/demo/${point.id}/${disk.image}`;
    const bare = await toRaw(image, "qcow2", directory.file("bare.raw"));
    const verdicts = [
      await compareImages({ path: restored, format: "raw" }, reference),
      await compareImages({ path: bare, format: "raw" }, reference),
    ];
    const wrong = verdicts.find((verdict) => verdict !== "identical");
    if (wrong !== undefined) throw new Error(`${disk.name} of ${point.id}: ${wrong}`);
    comparisons += verdicts.length;
    const counter = String(await readTrail(restored)).padStart(7);
    const kind = disk.kind.padEnd(11);
    say(`${point.id}  ${disk.name}  ${kind}  guest at ${counter}  ${styleText("green", "identical")}`);
  }
}
say("");
say("Each disk was compared twice: as tidemark restored it, and as qemu-img alone reads the repository.");
say(
  `On all disks of a point the guest had come equally far, to a step: one moment, ${comparisons} comparisons, no difference.`,
);
await machine.waitForGuestWriting(4);
say(`The guest still writes. ${((performance.now() - started) / 1000).toFixed(0)} s.`);

function heading(text: string): void {
  console.log(`\n${styleText("bold", text)}\n`);
}

function say(text: string): void {
  console.log(text === "" ? "" : `  ${text}`);
}

/** Runs tidemark and shows both the command and what it prints. */
async function command(args: readonly string[]): Promise<void> {
  const shown = args.map((word) =>
    word.replace(directory.path, "$DEMO").replace(proxy.socket, "$DEMO/qmp.sock"),
  );
  say(styleText("cyan", `$ tidemark ${shown.join(" ")}`));
  const { stdout, stderr } = await tidemark(args, { env });
  const text = `${stderr}${stdout}`.replaceAll(directory.path, "$DEMO").trimEnd();
  for (const line of text.split("\n")) say(line);
  say("");
}

async function quietly(args: readonly string[]): Promise<string> {
  return (await tidemark(args, { env })).stdout;
}
