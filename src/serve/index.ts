/**
 * Serving: a point's disks over NBD, for whoever wants to read them without a restore.
 *
 * - export: one disk, called as the disk.
 * - changed: the bitmap that shows what a point changed since its parent.
 */
export { servePoint, type PointServer, type ServeOptions } from "./run.js";
