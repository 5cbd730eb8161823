import { realpath, stat } from "node:fs/promises";
import { dirname, join, resolve, sep } from "node:path";
import { Option, type Command } from "commander";
import { formatSize } from "../../bytes/index.js";
import { messageOf, UsageError } from "../../errors/index.js";
import { formatOf } from "../../machine/index.js";
import { parseNbdUri } from "../../nbd/index.js";
import type { Extent } from "../../extent/index.js";
import type { PointManifest } from "../../repository/index.js";
import {
  restore,
  TARGET_FORMATS,
  type RestoreDisk,
  type RestoreResult,
  type TargetFormat,
  type TargetPlace,
} from "../../restore/index.js";
import { makeDirectories } from "../../storage/index.js";
import { integerArgument, rangeArgument, rateArgument, timeArgument } from "../arguments.js";
import { repositoryOf, withRepository, type CliContext, type CommonOptions } from "../context.js";
import { withEvents, type EmitEvent } from "../render/output.js";
import { progressFor } from "../render/progress.js";
import { pointAt, repositoryAt, requireNoFile } from "../repository.js";

interface RestoreCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly at?: Date;
  readonly disk?: string;
  readonly to?: string;
  readonly toDir?: string;
  readonly format?: TargetFormat;
  readonly range?: Extent;
  readonly force?: boolean;
  readonly onlyChanged?: boolean;
  readonly track?: boolean;
  readonly workers?: number;
  readonly bandwidth?: number;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine[@point]>", "an id, a prefix of one, a name, latest, latest~N"))
    .option("--at <time>", "the newest point at or before this time", timeArgument)
    .option("--disk <name>", "the disk to restore (not needed if there is only one)")
    .option(
      "--to <target>",
      "a file, a block device, an nbd:// or nbd+unix:// URI, or - for standard output (raw)",
    )
    .addOption(
      new Option("--to-dir <dir>", "all disks, as <dir>/<disk>.<format>").conflicts(["disk", "to", "range"]),
    )
    .addOption(
      new Option("--format <format>", "of the target (default: qcow2 for *.qcow2, else raw)").choices(
        TARGET_FORMATS,
      ),
    )
    .option("--range <offset:length>", "only these bytes of the disk", rangeArgument)
    .option("--force", "replace, or write over, a target that exists")
    .option("--only-changed", "write in place, and only what differs from what the target holds")
    .addOption(
      new Option(
        "--track",
        "leave the point's checkpoint in it (qcow2): the next backup of it is an increment of this point",
      ).conflicts("range"),
    )
    .option("--workers <n>", "worker threads (default: cores, at most 4)", integerArgument(1, 64))
    .option("--bandwidth <rate>", "bytes a second, e.g. 100MiB/s", rateArgument)
    .addHelpText(
      "after",
      `
EXAMPLES
  tidemark restore web@latest~1 --repo /backup --disk vda --to vda.raw
  tidemark restore web --repo /backup --disk vda --to nbd://rescue/vda --force --only-changed
  tidemark restore web@monday --repo /backup --to-dir /images --track
  tidemark restore web --repo /backup --at 2026-11-20T06:00:00Z --to-dir /restore --format qcow2`,
    )
    .action(async (reference: string, options: RestoreCommandOptions) => {
      await withEvents(
        context,
        options,
        (emit) => run(reference, options, context, emit),
        (result) => ({ ...result }),
      );
    });
}

async function run(
  reference: string,
  options: RestoreCommandOptions,
  context: CliContext,
  emit: EmitEvent,
): Promise<RestoreResult> {
  if (options.to === "-" && options.json === true) {
    throw new UsageError("--json and a restore to standard output cannot go together", {
      hint: "Restore to a file",
    });
  }
  const repository = await repositoryAt(options, context);
  const { point } = await pointAt(repository, reference, options, context);
  const disks = await chooseTargets(point, options, context);
  const progress = progressFor(context, options, emit);
  try {
    const result = await restore({
      repository,
      machine: point.machine.name,
      point: point.id,
      disks,
      format: formatFor(options),
      range: options.range,
      force: options.force,
      onlyChanged: options.onlyChanged,
      track: options.track,
      storageDaemon: context.environment["TIDEMARK_QSD"],
      workers: options.workers,
      bandwidth: options.bandwidth,
      signal: context.signal,
      observer: {
        progress: (event) => progress.update(event),
        warning: (message) => {
          emit({ event: "warning", message });
          if (options.json !== true) context.stderr.write(`tidemark: warning: ${message}\n`);
        },
      },
    });
    progress.stop();
    if (options.json !== true && options.quiet !== true && options.to !== "-") {
      for (const { name, target, bytes, writtenBytes } of result.disks) {
        const written = options.onlyChanged === true ? `, ${formatSize(writtenBytes)} written` : "";
        const what = `${name} of ${result.machine}@${result.point}`;
        context.stdout.write(`${what}: ${formatSize(bytes)} to ${target}${written}\n`);
      }
    }
    return result;
  } finally {
    progress.stop();
  }
}

async function chooseTargets(
  point: PointManifest,
  options: RestoreCommandOptions,
  context: CliContext,
): Promise<RestoreDisk[]> {
  const { toDir, to } = options;
  const format = formatFor(options);
  const root = repositoryOf(options, context);
  if (toDir !== undefined) {
    await requireOutside(root, toDir);
    await makeDirectory(toDir);
    return point.disks.map(({ name }) => ({ name, to: { path: join(toDir, `${name}.${format}`) } }));
  }
  if (to === undefined) {
    throw new UsageError("No target was given", {
      hint: "Give --to FILE for one disk, or --to-dir DIR for all",
    });
  }
  const [only, ...others] = point.disks;
  const name = options.disk ?? (others.length === 0 ? only?.name : undefined);
  if (name === undefined) {
    const names = point.disks.map((disk) => disk.name).join(", ");
    throw new UsageError("The point has more than one disk", { hint: `Name one with --disk: ${names}` });
  }
  const place = placeOf(to, context);
  if ("path" in place) {
    await requireOutside(root, place.path);
    await requireFormat(place.path, options);
  }
  return [{ name, to: place }];
}

/** @throws {UsageError} for a target in the repository: it would take the place of what points are made of */
async function requireOutside(repository: string, target: string): Promise<void> {
  const root = await realpath(repository);
  const place = await existing(target);
  if (place !== root && !place.startsWith(`${root}${sep}`)) return;
  throw new UsageError(`Cannot restore to ${target}: it is in the repository`, {
    hint: "Choose a place outside of it",
  });
}

/** The path itself, or what of it there is, without links. */
async function existing(path: string): Promise<string> {
  try {
    return await realpath(path);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if ((code !== "ENOENT" && code !== "ENOTDIR") || dirname(path) === path) throw error;
    return await existing(dirname(resolve(path)));
  }
}

/** Nobody restores raw bytes over a machine's qcow2 image without having said so. */
async function requireFormat(path: string, options: RestoreCommandOptions): Promise<void> {
  if (options.format !== undefined || formatFor(options) === "qcow2") return;
  const found = await stat(path).catch(() => undefined); // what is wrong with it, the restore will say
  if (found?.isFile() !== true || (await formatOf(path)) !== "qcow2") return;
  throw new UsageError(`The target ${path} is a qcow2 image, and no format was given`, {
    hint: "Give --format qcow2, or --format raw to have it replaced by a raw one",
  });
}

function formatFor({ format, to, toDir, track }: RestoreCommandOptions): TargetFormat {
  // Only qcow2 has room for checkpoints; the name of a file that was given says what it shall be, all the same.
  const isTracked = track === true && toDir !== undefined;
  return format ?? (isTracked || to?.endsWith(".qcow2") === true ? "qcow2" : "raw");
}

function placeOf(to: string, context: CliContext): TargetPlace {
  if (to === "-") return { stream: context.stdout };
  return /^nbds?(\+unix)?:/i.test(to) ? { uri: parseNbdUri(to), text: to } : { path: to };
}

async function makeDirectory(path: string): Promise<void> {
  await requireNoFile(path);
  try {
    await makeDirectories(resolve(path), 0o777);
  } catch (error) {
    throw new UsageError(`Cannot make directory ${path}: ${messageOf(error)}`, { cause: error });
  }
}
