import type { ImageFormat } from "./image.js";

/** How a disk is attached. */
export type Bus = "virtio-blk" | "virtio-scsi" | "ide" | "sata" | "nvme";

/** A disk of a test machine. */
export interface TestDisk {
  readonly path: string;
  readonly format: ImageFormat;
  /** Default virtio-blk. */
  readonly bus?: Bus;
  /** `drive`: -drive with an automatic node name; `blockdev`: -blockdev with a node name. Default blockdev. */
  readonly style?: "drive" | "blockdev";
  /** Id of the device; default `vd<N>`. `null`: an anonymous device, as a plain -drive makes it. */
  readonly id?: string | null;
  /** Id of the drive with style `drive`; default `drive<N>`. */
  readonly driveId?: string;
  /** Node name of the format node; default `node<N>` with style `blockdev`, automatic with `drive`. */
  readonly nodeName?: string;
  /** Puts the device (its controller with virtio-scsi) on an iothread of its own. */
  readonly iothread?: boolean;
  readonly readOnly?: boolean;
  /** A CD-ROM drive with this image in it (buses ide, sata, virtio-scsi). */
  readonly cdrom?: boolean;
  readonly serial?: string;
}

/** The names under which QEMU knows a disk. */
export interface DiskNames {
  /** Id of the device; undefined when it is anonymous. */
  readonly device: string | undefined;
  /** The drive's id; undefined with style `blockdev`. */
  readonly drive: string | undefined;
  /** The format node's name; undefined when QEMU makes one up. */
  readonly node: string | undefined;
  /** What HMP `qemu-io` wants: flags and name of the device's own block backend. */
  readonly backend: string | undefined;
}

/** The names of the disk at `index` of a machine. */
export function diskNames(disk: TestDisk, index: number): DiskNames {
  const isDrive = disk.style === "drive";
  const device = disk.id === null ? undefined : (disk.id ?? `vd${index}`);
  const drive = isDrive ? (disk.driveId ?? `drive${index}`) : undefined;
  const node = disk.nodeName ?? (isDrive ? undefined : `node${index}`);
  const isVirtioBlk = (disk.bus ?? "virtio-blk") === "virtio-blk";
  const path = `/machine/peripheral/${device ?? ""}${isVirtioBlk ? "/virtio-backend" : ""}`;
  return { device, drive, node, backend: drive ?? (device === undefined ? undefined : `-d ${path}`) };
}

/** The arguments of QEMU that give a machine of type `pc` these disks, the first one to boot from. */
export function diskArguments(disks: readonly TestDisk[]): string[] {
  const places = new Places();
  return disks.flatMap((disk, index) => {
    const names = diskNames(disk, index);
    const place = places.next(disk);
    return [...place.before, ...blockArguments(disk, names), "-device", device(disk, names, place, index)];
  });
}

function blockArguments(disk: TestDisk, names: DiskNames): string[] {
  // cache.no-flush: a killed process loses nothing, and tests are not about a host's power failure.
  if (names.drive !== undefined) {
    const media = disk.cdrom === true ? ",media=cdrom" : "";
    const node = names.node === undefined ? "" : `,node-name=${names.node}`;
    const readOnly = disk.readOnly === true ? ",readonly=on" : "";
    const options = `if=none,id=${names.drive},cache=unsafe,discard=unmap${node}${media}${readOnly}`;
    return ["-drive", `file=${escapeCommas(disk.path)},format=${disk.format},${options}`];
  }
  const common = {
    "read-only": disk.readOnly === true || disk.cdrom === true,
    discard: "unmap",
    cache: { "no-flush": true },
  };
  const node = {
    driver: disk.format,
    "node-name": names.node,
    ...common,
    file: { driver: "file", "node-name": `${names.node ?? ""}-file`, filename: disk.path, ...common },
  };
  return ["-blockdev", JSON.stringify(node)];
}

function device(disk: TestDisk, names: DiskNames, place: Place, index: number): string {
  const properties = [
    place.driver,
    `drive=${names.drive ?? names.node ?? ""}`,
    `bootindex=${index + 1}`,
    ...(names.device === undefined ? [] : [`id=${names.device}`]),
    ...(place.bus === undefined ? [] : [`bus=${place.bus}`]),
    ...place.properties,
    ...(disk.serial === undefined ? [] : [`serial=${disk.serial}`]),
  ];
  return properties.join(",");
}

interface Place {
  /** Arguments that must come before the device: iothread, controller. */
  readonly before: readonly string[];
  readonly driver: string;
  readonly bus?: string;
  readonly properties: readonly string[];
}

/** Hands out controllers and ports. */
class Places {
  #ide = 0;
  #sata = 0;
  #iothreads = 0;
  #controllers = 0;
  #nvme = 0;
  #scsi: string | undefined;

  next(disk: TestDisk): Place {
    const kind = disk.cdrom === true ? "cd" : "hd";
    switch (disk.bus ?? "virtio-blk") {
      case "virtio-blk": {
        const iothread = this.#iothread(disk);
        return {
          before: iothread.before,
          driver: "virtio-blk-pci",
          properties: iothread.property === undefined ? [] : [iothread.property],
        };
      }
      case "virtio-scsi":
        return { ...this.#scsiController(disk), driver: `scsi-${kind}`, properties: [] };
      case "ide": {
        const port = this.#ide++;
        return {
          before: [],
          driver: `ide-${kind}`,
          bus: `ide.${Math.floor(port / 2)}`,
          properties: [`unit=${port % 2}`],
        };
      }
      case "sata": {
        const port = this.#sata++;
        const before = port === 0 ? ["-device", "ahci,id=ahci0"] : [];
        return { before, driver: `ide-${kind}`, bus: `ahci0.${port}`, properties: [] };
      }
      case "nvme": {
        const serial = disk.serial === undefined ? [`serial=nvme${this.#nvme++}`] : [];
        return { before: [], driver: "nvme", properties: serial };
      }
    }
  }

  #iothread(disk: TestDisk): { before: string[]; property?: string } {
    if (disk.iothread !== true) return { before: [] };
    const id = `io${this.#iothreads++}`;
    return { before: ["-object", `iothread,id=${id}`], property: `iothread=${id}` };
  }

  #scsiController(disk: TestDisk): { before: string[]; bus: string } {
    if (disk.iothread !== true && this.#scsi !== undefined) return { before: [], bus: this.#scsi };
    const iothread = this.#iothread(disk);
    const id = `scsi${this.#controllers++}`;
    const properties = ["virtio-scsi-pci", `id=${id}`, ...(iothread.property ? [iothread.property] : [])];
    if (disk.iothread !== true) this.#scsi = `${id}.0`;
    return { before: [...iothread.before, "-device", properties.join(",")], bus: `${id}.0` };
  }
}

/** QEMU's key=value options end at a comma; a doubled one stands for itself. */
export function escapeCommas(text: string): string {
  return text.replaceAll(",", ",,");
}
