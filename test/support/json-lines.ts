import type { Socket } from "node:net";

/** Calls `onLine` with every line that arrives, without its end; a last line that never ends is dropped. */
export function readLines(socket: Socket, onLine: (line: string) => void): void {
  // latin1 keeps every byte as it is: 0xFF, which resynchronises a monitor, survives the way through.
  socket.setEncoding("latin1");
  let pending = "";
  socket.on("data", (text: string) => {
    const lines = (pending + text).split("\n");
    pending = lines.pop() ?? "";
    for (const line of lines) onLine(line.replace(/\r$/, ""));
  });
}

/** Writes a line that `readLines` gave. */
export function writeLine(socket: Socket, line: string): void {
  if (!socket.destroyed) socket.write(`${line}\r\n`, "latin1");
}

/** The JSON object of a line; undefined when it is none. */
export function parseLine(line: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(Buffer.from(line, "latin1").toString("utf8"));
    return isRecord(value) ? value : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** An object as a line for `writeLine`. */
export function formatLine(value: unknown): string {
  return Buffer.from(JSON.stringify(value), "utf8").toString("latin1");
}

/** Whether a JSON value is an object. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
