/** Inspect: what a repository holds, and what a machine carries. Changes nothing. */
export { leftoverLines, type LeftoverLine } from "./leftovers.js";
export { chainOf, pointTree, type PointLine, type PointState } from "./points.js";
export { restoreCost, type DiskCost, type ImageCost, type RestoreCost } from "./restore-cost.js";
export {
  inspectMachine,
  type CheckpointStatus,
  type DiskStatus,
  type InspectOptions,
  type MachineStatus,
  type NextBackup,
} from "./status.js";
