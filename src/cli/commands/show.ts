import type { Command } from "commander";
import { formatSize } from "../../bytes/index.js";
import { chainOf } from "../../inspect/index.js";
import { currentPoint, type PointManifest } from "../../repository/index.js";
import { timeArgument } from "../arguments.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { report } from "../render/output.js";
import { formatTime, pointView } from "../render/point.js";
import { renderTable } from "../render/table.js";
import { pointAt, repositoryAt } from "../repository.js";

interface ShowOptions extends CommonOptions {
  readonly repo?: string;
  readonly at?: Date;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine[@point]>", "an id, a prefix of one, a name, latest, latest~N"))
    .option("--at <time>", "the newest point at or before this time", timeArgument)
    .addHelpText(
      "after",
      "\nEXAMPLES\n  tidemark show web --repo /backup\n  tidemark show web@latest~3 --repo /backup --json",
    )
    .action(async (reference: string, options: ShowOptions) => {
      const repository = await repositoryAt(options, context);
      const { point, points } = await pointAt(repository, reference, options, context);
      const isCurrent = currentPoint(points) === point;
      const chain = chainOf(points, point);
      const document = { ...pointView(point, isCurrent), chain };
      report(context, options, document, () => renderPoint(point, isCurrent, chain));
    });
}

function renderPoint(point: PointManifest, isCurrent: boolean, chain: readonly string[]): string {
  const { machine, id, name, description, created, state, consistency, versions, disks } = point;
  const facts: [string, string][] = [
    ["point", `${machine.name}@${id}${isCurrent ? "  (current)" : ""}`],
    ...(name === null ? [] : [["name", name] as [string, string]]),
    ...(description === null ? [] : [["description", description] as [string, string]]),
    ["created", `${formatTime(created)} UTC, machine ${state}, ${consistency}-consistent`],
    ["machine", `${machine.uuid ?? "no uuid"}, QEMU ${versions.qemu ?? "unknown"}`],
    ["chain", `${chain.length} ${chain.length === 1 ? "point" : "points"}, down to ${chain.at(-1) ?? id}`],
  ];
  const rows = disks.map((disk) => [
    disk.name,
    disk.kind,
    formatSize(disk.virtualSize),
    formatSize(disk.bytes),
    formatSize(disk.dataClusters * disk.clusterSize),
    formatSize(disk.zeroClusters * disk.clusterSize),
  ]);
  const table = renderTable(
    [
      { title: "DISK" },
      { title: "KIND" },
      { title: "SIZE", align: "right" },
      { title: "STORED", align: "right" },
      { title: "DATA", align: "right" },
      { title: "ZEROES", align: "right" },
    ],
    rows,
  );
  const reasons = disks.flatMap((disk) =>
    disk.reason === null
      ? []
      : [`${disk.name} is ${disk.kind}${disk.kind === "full" ? ":" : ","} ${disk.reason}\n`],
  );
  const head = facts.map(([title, value]) => `${title.padEnd(12)} ${value}\n`).join("");
  return `${head}\n${table}${reasons.length > 0 ? "\n" : ""}${reasons.join("")}`;
}
