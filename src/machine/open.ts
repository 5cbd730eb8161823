import type { IoOptions } from "../bytes/index.js";
import { openLiveMachine, type LiveMachineOptions } from "./live.js";
import { OfflineMachine, type OfflineMachineOptions } from "./offline/offline.js";
import type { QmpSource } from "./source.js";

/** A machine to work on: live behind its monitor, or off, as its images. */
export type MachineChoice =
  | ({ readonly kind: "live" } & Omit<LiveMachineOptions, "signal" | "lookOnly">)
  | ({ readonly kind: "off" } & Omit<OfflineMachineOptions, "signal">);

/** Opens a machine to work on it: see `openLiveMachine` and `OfflineMachine.open`. */
export async function openMachine(
  choice: MachineChoice,
  options: IoOptions = {},
): Promise<QmpSource & AsyncDisposable> {
  return choice.kind === "live"
    ? await openLiveMachine({ ...choice, ...options })
    : await OfflineMachine.open({ ...choice, ...options });
}
