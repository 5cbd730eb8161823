/**
 * Names and ids. A *point* (a checkpoint's content in a repository) and its *checkpoint* (in QEMU) share one
 * id. A disk's *token* ties the bitmap that the disk carries to its chain. A *run* is one invocation that
 * makes things in QEMU; everything it makes there bears the run's id.
 */
export {
  formatBitmapName,
  newDiskToken,
  parseBitmapName,
  repositoryTag,
  type BitmapIdentity,
} from "./bitmap-name.js";
export { isPointId, newPointId, pointTime } from "./id.js";
export { isName, requireName } from "./name.js";
export {
  formatRunObject,
  newRunId,
  parseRunObject,
  RUN_OBJECT_KINDS,
  type RunObject,
  type RunObjectKind,
} from "./run-name.js";
