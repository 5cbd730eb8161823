import { readFile, stat, statfs } from "node:fs/promises";

/** Of btrfs (linux/magic.h): stat() tells the subvolume's device there, /proc/locks the file system's. */
const BTRFS_SUPER_MAGIC = 0x9123683e;

/**
 * Whether any process of this host holds a lock on a file. QEMU locks its images (open file description
 * locks, listed by Linux in /proc/locks by device and inode); so do other programs that mind theirs.
 */
export async function isLocked(path: string): Promise<boolean> {
  const { dev, ino } = await stat(path, { bigint: true });
  // Linux: the device as major:minor in hex, at least two digits each (proc(5), /proc/locks).
  const major = ((dev >> 8n) & 0xfffn) | ((dev >> 32n) & ~0xfffn);
  const minor = (dev & 0xffn) | ((dev >> 12n) & ~0xffn);
  const hex = (value: bigint): string => value.toString(16).padStart(2, "0");
  const { type } = await statfs(path);
  const device = type === BTRFS_SUPER_MAGIC ? "" : ` ${hex(major)}:${hex(minor)}`;
  return (await readFile("/proc/locks", "utf8")).includes(`${device}:${ino.toString()} `);
}
