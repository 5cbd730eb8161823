/**
 * Backup: from a frozen point to a point in a repository.
 *
 * - *plan of a disk*: an increment of its base, or full and why; *plan of a range*: which clusters to read, which
 *   to store as zeroes.
 * - *unit*: what a worker reads and compresses at once.
 */
export type { BackupObserver } from "./observer.js";
export { backup, type BackupOptions } from "./run.js";
