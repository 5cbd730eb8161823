import type { IoOptions } from "../../bytes/index.js";
import type { QmpClient } from "../../qmp/index.js";
import type { LiveDisk } from "./discover.js";
import type { MachineIdentity, MachineState } from "../source.js";

const NO_UUID = "00000000-0000-0000-0000-000000000000";

/** Asks QEMU who the machine is. */
export async function identify(
  qmp: QmpClient,
  disks: readonly LiveDisk[],
  options: IoOptions = {},
): Promise<MachineIdentity> {
  const [name, uuid, status, migration, target, memory, cpus, type] = await Promise.all([
    qmp.execute("query-name", undefined, options),
    qmp.execute("query-uuid", undefined, options),
    qmp.execute("query-status", undefined, options),
    qmp.execute("query-migrate", undefined, options),
    qmp.execute("query-target", undefined, options),
    qmp.execute("query-memory-size-summary", undefined, options),
    qmp.execute("query-cpus-fast", undefined, options),
    qmp.execute("qom-get", { path: "/machine", property: "type" }, options),
  ]);
  const { version, package: build } = qmp.greeting;
  const number = `${version.major}.${version.minor}.${version.micro}`;
  return {
    name: name ?? null,
    uuid: uuid === NO_UUID ? null : uuid,
    state: stateOf(status),
    wasAway: migration.status === "completed" && migration.isSource,
    qemuVersion: build === "" ? number : `${number} (${build})`,
    configuration: {
      architecture: target,
      type: typeof type === "string" ? type.replace(/-machine$/, "") : null,
      memory,
      cpus,
      disks: disks.map((disk) => ({
        name: disk.suggestedName,
        device: disk.deviceType,
        qdev: disk.qdev,
        drive: disk.driveId,
        node: disk.node,
        serial: disk.serial,
        format: disk.format,
        file: disk.imageFile,
      })),
    },
  };
}

/** QEMU's run states, as far as a backup cares: "shutdown" is a guest that has powered off, QEMU remaining. */
export function stateOf(status: string): MachineState {
  if (status === "running") return "running";
  return status === "shutdown" ? "shut off" : "paused";
}
