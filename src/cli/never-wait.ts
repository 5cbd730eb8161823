/**
 * Lets writes to a terminal wait in memory. Node makes them wait in the system call: a terminal that takes nothing (a
 * session whose network is gone, Ctrl-S) would then stop the whole program, and with it the watch over the scratch
 * files that the guest's writes need room in.
 */
export function neverWait(stream: NodeJS.WriteStream): void {
  if (!stream.isTTY) return;
  // Node offers no public way.
  const { _handle } = stream as unknown as {
    readonly _handle?: { setBlocking?(on: boolean): number } | null;
  };
  _handle?.setBlocking?.(false);
}
