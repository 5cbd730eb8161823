import type { Socket } from "node:net";
import { judgeOnThisHost, thisProcess, type ProcessIdentity } from "../../process/index.js";
import { HeldConnections } from "./held-connections.js";
import { closed, hear, say, type HoldOrder, type Order } from "./orders.js";
import { ScratchWatch } from "./scratch-watch.js";
import { takeOver } from "./take-over.js";

/** Milliseconds between two looks at the agent. */
const INTERVAL = 1000;

/**
 * A guard's life: it holds what it was given as long as its agent lives, and watches the scratch. When the agent
 * tells it that all is done, it goes; when the agent is gone without a word, it ends the agent's run.
 *
 * @param control the connection to the agent; its end tells the agent's death, since only the agent has the other end.
 *   Mostly: a dead process whose thread still waits in the kernel, for a disk that does not answer, keeps its
 *   descriptors as long as that takes. So the guard looks at the process itself, too
 */
export async function hold(control: Socket): Promise<void> {
  const guard = new Guard(control);
  hear(control, (message) => guard.obey(message as Order));
  await closed(control);
  await guard.finish();
}

class Guard {
  readonly #control: Socket;
  #held:
    | { readonly order: HoldOrder; readonly connections: HeldConnections; readonly watch: ScratchWatch }
    | undefined;
  #isDone = false;
  #hasSuccessor = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(control: Socket) {
    this.#control = control;
  }

  obey(message: Order): void {
    switch (message.order) {
      case "hold":
        this.#hold(message);
        break;
      case "watch":
        this.#held?.watch.bound(message.scratch);
        break;
      case "succession":
        this.#hasSuccessor = message.isUnderWay;
        break;
      case "ending":
        this.#held?.watch.agentEnds();
        break;
      case "letGo":
        this.#held?.connections.close();
        say(this.#control, { report: "letGone" });
        break;
      case "done":
        this.#isDone = true;
        this.#control.destroy();
    }
  }

  /** The agent has left, or is dead. One that died before it told what to hold had nothing in QEMU yet. */
  async finish(): Promise<void> {
    clearInterval(this.#timer);
    this.#held?.watch.stop();
    if (this.#held === undefined || this.#isDone) return;
    await takeOver(this.#held.order, this.#held.connections);
  }

  #hold(order: HoldOrder): void {
    const connections = new HeldConnections(order.connections);
    const watch = new ScratchWatch(order.agent, (what) => say(this.#control, { report: "full", what }));
    watch.bound(order.scratch);
    this.#held = { order, connections, watch };
    this.#timer = setInterval(() => void this.#lookAt(order.agent), INTERVAL);
    this.#timer.unref();
    void thisProcess().then((guard) => say(this.#control, { report: "holding", guard }));
  }

  /** Its control connection says no more than that somebody still has its other end. */
  async #lookAt(agent: ProcessIdentity): Promise<void> {
    if ((await judgeOnThisHost(agent, await thisProcess())) === "gone" && !this.#hasSuccessor)
      this.#control.destroy();
  }
}
