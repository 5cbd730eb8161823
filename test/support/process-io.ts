import { readFile } from "node:fs/promises";

/** Bytes that a process has moved by system calls, whatever threads of it did. Blocks that files come to share are not among them. */
export interface ProcessIo {
  readonly read: number;
  readonly written: number;
}

/** What this process has read and written so far, as the kernel counts it: proc(5), /proc/pid/io. */
export async function ownIo(): Promise<ProcessIo> {
  const text = await readFile("/proc/self/io", "utf8");
  const field = (name: string): number => Number(new RegExp(`^${name}: (\\d+)$`, "m").exec(text)?.[1]);
  return { read: field("rchar"), written: field("wchar") };
}

/** What this process reads and writes while `work` goes on. */
export async function ioOf<T>(
  work: () => Promise<T>,
): Promise<{ readonly result: T; readonly io: ProcessIo }> {
  const before = await ownIo();
  const result = await work();
  const after = await ownIo();
  return { result, io: { read: after.read - before.read, written: after.written - before.written } };
}
