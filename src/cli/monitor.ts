import { resolve } from "node:path";
import { parseQmpAddress, type QmpAddress } from "../qmp/index.js";

/** Reads `--qmp`. A relative path becomes absolute: QEMU, which is told of its folder, has a working directory of its own. */
export function monitorAt(text: string): QmpAddress {
  const address = parseQmpAddress(text);
  return address.transport === "unix" ? { ...address, path: resolve(address.path) } : address;
}
