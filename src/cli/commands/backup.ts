import { resolve } from "node:path";
import { Option, type Command } from "commander";
import { backup, type BackupObserver } from "../../backup/index.js";
import { formatSize } from "../../bytes/index.js";
import { UsageError } from "../../errors/index.js";
import type { ImageChoice, MachineChoice } from "../../machine/index.js";
import type { PointManifest } from "../../repository/index.js";
import { diskArgument, imageArgument, integerArgument, rateArgument, sizeArgument } from "../arguments.js";
import { runDirectory, withRepository, type CliContext, type CommonOptions } from "../context.js";
import { monitorAt } from "../monitor.js";
import { withEvents, type EmitEvent } from "../render/output.js";
import { pointView, storedBytes } from "../render/point.js";
import { progressFor, type Progress } from "../render/progress.js";
import { repositoryAt } from "../repository.js";
import { VERSION } from "../version.js";

interface BackupCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly machine: string;
  readonly qmp?: string;
  readonly image?: ImageChoice[];
  readonly disk?: { device: string; name?: string }[];
  readonly full?: boolean;
  readonly compare?: boolean;
  readonly since?: string;
  readonly keepCheckpoints: number;
  readonly name?: string;
  readonly description?: string;
  readonly scratch?: string;
  readonly scratchLimit?: number;
  readonly socketDir?: string;
  readonly level: number;
  readonly workers?: number;
  readonly bandwidth?: number;
  readonly allowUnguarded?: boolean;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command)
    .requiredOption("--machine <name>", "the machine's name in the repository")
    .option("--qmp <socket>", "its QMP monitor, if it runs: a unix socket, or tcp:host:port")
    .addOption(
      new Option("--image <[name=]file>", "its disk image, if it is off; repeatable")
        .argParser(imageArgument)
        .conflicts(["qmp", "disk", "allowUnguarded"]),
    )
    .option(
      "--disk <device[=name]>",
      "only this disk, by device id, drive id, node or qdev; repeatable",
      diskArgument,
    )
    .addOption(new Option("--full", "read everything, start a new chain").conflicts(["compare", "since"]))
    .option("--compare", "read everything, store what differs from the newest point")
    .option("--since <point>", "a differential: an increment of this point, not of the newest")
    .option(
      "--keep-checkpoints <n>",
      "how many checkpoints stay in the machine, 1 to 16, for --since",
      integerArgument(1, 16),
      1,
    )
    .option("--name <text>", "a name for the point, unique within the machine")
    .option("--description <text>", "words about it")
    .option("--level <1..19>", "zstd compression level", integerArgument(1, 19), 3)
    .option("--workers <n>", "worker threads (default: cores, at most 4)", integerArgument(1, 64))
    .option("--bandwidth <rate>", "bytes a second read from the machine, e.g. 100MiB/s", rateArgument)
    .option("--scratch <dir>", "where old data goes meanwhile (default: beside each disk's image)")
    .option(
      "--scratch-limit <size>",
      "end the backup rather than use more (default: half the free space)",
      sizeArgument,
    )
    .option("--socket-dir <dir>", "where the directory of the NBD socket is made")
    .option(
      "--allow-unguarded",
      "go on where no guard can be started, which protects the machine from a killed backup",
    )
    .addHelpText(
      "after",
      `
EXAMPLES
  tidemark backup --repo /backup --machine web --qmp /run/vm/web.qmp
  tidemark backup --repo /backup --machine db --qmp /run/vm/db.qmp --disk vda=root --disk vdb=data --level 1
  tidemark backup --repo /backup --machine web --image vda=/images/web.qcow2
  tidemark backup --repo /backup --machine web --qmp /run/vm/web.qmp --since monday --keep-checkpoints 7`,
    )
    .action(async (options: BackupCommandOptions) => {
      await withEvents(
        context,
        options,
        (emit) => run(options, context, emit),
        (point) => ({ point: pointView(point, true) }),
      );
    });
}

async function run(
  options: BackupCommandOptions,
  context: CliContext,
  emit: EmitEvent,
): Promise<PointManifest> {
  const source = sourceOf(options, context);
  const repository = await repositoryAt(options, context);
  const progress = progressFor(context, options, emit);
  const started = performance.now();
  try {
    const point = await backup({
      repository,
      machine: options.machine,
      source,
      full: options.full,
      compare: options.compare,
      since: options.since,
      keepCheckpoints: options.keepCheckpoints,
      name: options.name,
      description: options.description,
      level: options.level,
      workers: options.workers,
      bandwidth: options.bandwidth,
      scratchDirectory: absolute(options.scratch),
      scratchLimit: options.scratchLimit,
      socketDirectory: absolute(options.socketDir),
      tidemarkVersion: VERSION,
      signal: context.signal,
      observer: observerFor(options, context, emit, progress),
    });
    progress.stop();
    if (options.json !== true && options.quiet !== true) {
      context.stdout.write(summarize(point, (performance.now() - started) / 1000));
    }
    return point;
  } finally {
    progress.stop();
  }
}

/** QEMU has a working directory of its own. */
function absolute(path: string | undefined): string | undefined {
  return path === undefined ? undefined : resolve(path);
}

/** The machine to back up: behind a monitor, or as images. @throws {UsageError} when neither is named */
function sourceOf(options: BackupCommandOptions, context: CliContext): MachineChoice {
  const { qmp, image, disk: select, allowUnguarded } = options;
  if (image !== undefined) {
    const storageDaemon = context.environment["TIDEMARK_QSD"];
    return { kind: "off", images: image, runDirectory: runDirectory(context), storageDaemon };
  }
  if (qmp === undefined) {
    throw new UsageError("Neither --qmp nor --image was given", {
      hint: "Give --qmp SOCKET for a machine that runs, or --image FILE for each disk of one that is off",
    });
  }
  const address = monitorAt(qmp);
  return { kind: "live", address, runDirectory: runDirectory(context), select, allowUnguarded };
}

function observerFor(
  options: BackupCommandOptions,
  context: CliContext,
  emit: EmitEvent,
  progress: Progress,
): BackupObserver {
  return {
    disk: (disk) => {
      emit({ event: "disk", ...disk });
      if (options.json === true || options.quiet === true) return;
      const why = disk.reason === null ? "" : `: ${disk.reason}`;
      context.stderr.write(`${disk.name}: ${disk.kind}${why}\n`);
    },
    progress: (event) => progress.update(event),
    warning: (message) => {
      emit({ event: "warning", message });
      if (options.json !== true) context.stderr.write(`tidemark: warning: ${message}\n`);
    },
  };
}

function summarize(point: PointManifest, seconds: number): string {
  const data = point.disks.reduce((sum, disk) => sum + disk.dataClusters * disk.clusterSize, 0);
  const size = `${formatSize(data)} of data, ${formatSize(storedBytes(point))} stored`;
  return `${point.machine.name}@${point.id}: ${size}, ${seconds.toFixed(1)} s\n`;
}
