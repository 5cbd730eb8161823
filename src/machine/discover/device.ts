import type { IoOptions } from "../../bytes/index.js";
import type { QmpClient } from "../../qmp/index.js";

/** What QOM, QEMU's object model, says of a disk's device. */
export interface DeviceFacts {
  /** Id given with `-device …,id=`; null for an anonymous one. */
  readonly deviceId: string | null;
  /** QOM type: "scsi-hd", "virtio-blk-device" … */
  readonly type: string;
  readonly serial: string | null;
  /** QOM path of the iothread that serves the device or its controller; null for the main loop. */
  readonly iothread: string | null;
}

/** A device that takes a disk past QEMU's block layer, so no bitmap sees what it writes. */
export interface HiddenDevice {
  readonly device: string;
  readonly type: string;
}

const PERIPHERAL = "/machine/peripheral";
const VHOST_DISK = /^child<((?:vhost-user-blk|vhost-user-scsi|vhost-scsi)[\w-]*)>$/;

/** The id of a device, from what `query-block` calls it: the id itself or a QOM path. */
export function deviceIdOf(qdev: string): string | null {
  if (!qdev.startsWith("/")) return qdev;
  const rest = qdev.startsWith(`${PERIPHERAL}/`) ? qdev.slice(PERIPHERAL.length + 1) : undefined;
  return rest?.split("/")[0] ?? null;
}

/** Asks QOM about a device. @param qdev as `query-block` reports it */
export async function inspectDevice(
  qmp: QmpClient,
  qdev: string,
  options: IoOptions = {},
): Promise<DeviceFacts> {
  const path = qdev.startsWith("/") ? qdev : `${PERIPHERAL}/${qdev}`;
  const own = await readProperties(qmp, path, ["type", "serial", "parent_bus", ...IOTHREAD], options);
  // A SCSI disk has none of its own: its controller stands above its bus.
  const bus = own.get("parent_bus");
  const controller =
    typeof bus === "string" && bus.startsWith("/")
      ? await readProperties(qmp, bus.slice(0, bus.lastIndexOf("/")), IOTHREAD, options)
      : new Map<string, unknown>();
  return {
    deviceId: deviceIdOf(qdev),
    type: textOf(own.get("type")) ?? "unknown",
    serial: textOf(own.get("serial")),
    iothread: iothreadOf(own) ?? iothreadOf(controller),
  };
}

/** Devices that are disks for the guest and unknown to QEMU's block layer. */
export async function hiddenDevices(qmp: QmpClient, options: IoOptions = {}): Promise<HiddenDevice[]> {
  const places = [PERIPHERAL, "/machine/peripheral-anon"];
  const lists = await Promise.all(
    places.map(async (path) => ({ path, items: await qmp.execute("qom-list", { path }, options) })),
  );
  return lists.flatMap(({ path, items }) =>
    items.flatMap(({ name, type }) => {
      const hidden = VHOST_DISK.exec(type)?.[1];
      if (hidden === undefined) return [];
      return [{ device: path === PERIPHERAL ? name : `${path}/${name}`, type: hidden }];
    }),
  );
}

/** `iothread` is a link; `iothread-vq-mapping` (9.0) a list, null when it was not given. */
const IOTHREAD = ["iothread", "iothread-vq-mapping"];

function iothreadOf(properties: ReadonlyMap<string, unknown>): string | null {
  const mapping = properties.get("iothread-vq-mapping");
  if (Array.isArray(mapping) && mapping.length > 0) return "iothread-vq-mapping";
  return textOf(properties.get("iothread"));
}

async function readProperties(
  qmp: QmpClient,
  path: string,
  names: readonly string[],
  options: IoOptions,
): Promise<Map<string, unknown>> {
  const there = new Set((await qmp.execute("qom-list", { path }, options)).map(({ name }) => name));
  const entries = await Promise.all(
    names
      .filter((property) => there.has(property))
      .map(
        async (property) => [property, await qmp.execute("qom-get", { path, property }, options)] as const,
      ),
  );
  return new Map(entries);
}

function textOf(value: unknown): string | null {
  return typeof value === "string" && value !== "" ? value : null;
}
