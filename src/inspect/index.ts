/** Inspect: what a repository holds, and what a machine carries. Changes nothing. */
export { leftoverLines, type LeftoverLine } from "./leftovers.js";
export { chainOf, pointTree, type PointLine } from "./points.js";
export {
  inspectMachine,
  type CheckpointStatus,
  type DiskStatus,
  type InspectOptions,
  type MachineStatus,
} from "./status.js";
