import type { Command } from "commander";
import { formatSize } from "../../bytes/index.js";
import { inspectMachine, type MachineStatus, type NextBackup } from "../../inspect/index.js";
import {
  requireMachineForRepository,
  runDirectory,
  withRepository,
  type CliContext,
  type CommonOptions,
} from "../context.js";
import { monitorAt } from "../monitor.js";
import { report } from "../render/output.js";
import { renderTable } from "../render/table.js";
import { repositoryAt } from "../repository.js";

interface StatusOptions extends CommonOptions {
  readonly repo?: string;
  readonly qmp: string;
  readonly machine?: string;
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command)
    .requiredOption("--qmp <socket>", "the machine's QMP monitor")
    .option("--machine <name>", "its name in the repository: says what the next backup would do")
    .addHelpText(
      "after",
      `
EXAMPLES
  tidemark status --qmp /run/vm/web.qmp
  tidemark status --qmp /run/vm/web.qmp --machine web --repo /backup`,
    )
    .action(async (options: StatusOptions) => {
      const address = monitorAt(options.qmp);
      const { machine } = options;
      requireMachineForRepository(options);
      const repository = machine === undefined ? undefined : await repositoryAt(options, context);
      const status = await inspectMachine({
        address,
        runDirectory: runDirectory(context),
        catalogue: repository === undefined || machine === undefined ? undefined : { repository, machine },
        signal: context.signal,
      });
      report(context, options, status, () => renderStatus(status));
    });
}

function describeNext({ kind, reason, parent }: NextBackup): string {
  const what = parent === null ? kind : `${kind} of ${parent}`;
  return reason === null ? what : `${what}: ${reason}`;
}

function renderStatus({ machine, disks, refused, leftovers }: MachineStatus): string {
  const lines = [
    `machine ${machine.name ?? "(no name)"}, ${machine.uuid ?? "no uuid"}: ${machine.state}, QEMU ${machine.qemu}`,
    "",
  ];
  const table = renderTable(
    [{ title: "DISK" }, { title: "SIZE", align: "right" }, { title: "NEXT BACKUP" }],
    disks.map(({ name, virtualSize, next }) => [
      name,
      formatSize(virtualSize),
      next === null ? "not known without --machine" : describeNext(next),
    ]),
  );
  const checkpoints = disks.flatMap((disk) =>
    disk.checkpoints.map(({ id, repository, dirtyBytes, state }) => [
      disk.name,
      id,
      repository,
      formatSize(dirtyBytes),
      state,
    ]),
  );
  if (checkpoints.length > 0) {
    const columns = ["DISK", "CHECKPOINT", "REPOSITORY", "DIRTY", "STATE"].map((title) => ({ title }));
    lines.push(table, renderTable(columns, checkpoints));
  } else lines.push(table);
  lines.push(...refused.map(({ name, reason }) => `cannot be backed up: ${name}: ${reason}`));
  lines.push(
    ...leftovers.map(({ kind, name, run, mayBeAlive }) => {
      const whose = run === null ? "an earlier run" : `run ${run}`;
      return mayBeAlive
        ? `of ${whose}, which may be alive (it is not known here): ${kind} ${name}`
        : `left by ${whose}: ${kind} ${name}`;
    }),
  );
  return `${lines.join("\n").trimEnd()}\n`;
}
