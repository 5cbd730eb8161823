import type { Socket } from "node:net";
import type { ProcessIdentity } from "../../process/index.js";
import type { QmpAddress } from "../../qmp/index.js";

/** Scratch files that share a limit, as a guard watches them. */
export interface ScratchBound {
  /** Bytes that all of the files may take. */
  readonly limit: number;
  /** Bytes that must stay free on their file system. */
  readonly reserve: number;
  readonly files: readonly string[];
}

/** What a guard has to know, told once. Descriptors are numbers in the guard. */
export interface HoldOrder {
  readonly order: "hold";
  readonly run: string;
  readonly runDirectory: string;
  /** The monitor, should the connection to it be lost. */
  readonly address: QmpAddress;
  readonly agent: ProcessIdentity;
  /** The agent's connection to the monitor; null when it has none any more. */
  readonly qmp: number | null;
  /** The agent's end of the control connection of the guard that this one relieves. */
  readonly previous: number | null;
  /** NBD connections. */
  readonly connections: readonly number[];
  readonly scratch: readonly ScratchBound[];
}

/** What an agent tells its guard. */
export type Order =
  | HoldOrder
  /** There are scratch files to watch now. */
  | { readonly order: "watch"; readonly scratch: readonly ScratchBound[] }
  /** Another guard is being started in this one's place: it alone ends the run if the agent dies. Or it did not come about. */
  | { readonly order: "succession"; readonly isUnderWay: boolean }
  /** The agent takes the frozen point down: it is not stuck. */
  | { readonly order: "ending" }
  /** Close the NBD connections: their exports are gone. */
  | { readonly order: "letGo" }
  /** The run has ended, or another guard has taken this one's place. */
  | { readonly order: "done" };

/** What a guard tells its agent. */
export type Report =
  /** It holds everything: from now on the agent may die. */
  | { readonly report: "holding"; readonly guard: ProcessIdentity }
  /** A bound is passed. Without an answer the guard ends the agent and takes over. */
  | { readonly report: "full"; readonly what: string }
  | { readonly report: "letGone" };

/** Says something over a control connection: one line of JSON. */
export function say(control: Socket, message: Order | Report): void {
  if (control.writable) control.write(`${JSON.stringify(message)}\n`);
}

/**
 * Hears what the other end says, until it ends. Both ends are of one build, so a line is what its type says; the rest
 * of a line that was never finished is dropped.
 */
export function hear(control: Socket, onMessage: (message: Order | Report) => void): void {
  let unfinished = "";
  control.setEncoding("utf8").on("data", (text: string) => {
    const lines = (unfinished + text).split("\n");
    unfinished = lines.pop() ?? "";
    for (const line of lines) onMessage(JSON.parse(line) as Order | Report);
  });
}

/**
 * Waits until the other end is gone, or this one closed. How it went does not matter: one that was killed with words
 * unread resets the connection.
 */
export async function closed(control: Socket): Promise<void> {
  control.on("error", () => undefined);
  await new Promise<void>((resolve) => control.once("close", () => resolve()));
}
