import type { Transferable, Worker } from "node:worker_threads";
import { messageOf, TidemarkError } from "../errors/index.js";
import { deferred, type Deferred } from "../flow/index.js";
import { startWorker } from "./entry.js";
import { fromThreadError } from "./thread-error.js";
import type { ThreadCall, ThreadReply } from "./thread.js";

/** One worker thread and the calls that wait for its answer. */
export class Thread {
  readonly #worker: Worker;
  readonly #waiting = new Map<number, Deferred<unknown>>();
  #lastId = 0;
  #death: Error | undefined;

  constructor(script: URL, workerData: unknown) {
    this.#worker = startWorker(script, workerData);
    this.#worker.on("message", (reply: ThreadReply) => this.#settle(reply));
    this.#worker.on("error", (error) =>
      this.#die(
        new TidemarkError("TM_WORKER", `Worker thread failed: ${messageOf(error)}`, { cause: error }),
      ),
    );
    this.#worker.on("exit", (code) =>
      this.#die(new TidemarkError("TM_WORKER", `Worker thread ended with code ${code}`)),
    );
  }

  get load(): number {
    return this.#waiting.size;
  }

  /**
   * Calls a method.
   *
   * @param transfer buffers that change hands instead of being copied
   * @throws what the method threw, or TM_WORKER when the thread died
   */
  async call(method: string, argument: unknown, transfer: readonly Transferable[] = []): Promise<unknown> {
    if (this.#death !== undefined) throw this.#death;
    const id = (this.#lastId += 1);
    const waiter = deferred<unknown>();
    this.#waiting.set(id, waiter);
    this.#worker.postMessage({ id, method, argument } satisfies ThreadCall, [...transfer]);
    return await waiter.promise;
  }

  async stop(): Promise<void> {
    await this.#worker.terminate();
  }

  #settle(reply: ThreadReply): void {
    const waiter = this.#waiting.get(reply.id);
    this.#waiting.delete(reply.id);
    if ("error" in reply) waiter?.reject(fromThreadError(reply.error));
    else waiter?.resolve(reply.value);
  }

  #die(error: Error): void {
    this.#death ??= error;
    for (const waiter of this.#waiting.values()) waiter.reject(this.#death);
    this.#waiting.clear();
  }
}

/** A fixed number of worker threads that run the same module; calls go to the one with the least to do. */
export class WorkerPool {
  readonly threads: readonly Thread[];

  private constructor(threads: readonly Thread[]) {
    this.threads = threads;
  }

  /** @param script see startWorker() */
  static start(script: URL, count: number, workerData: unknown): WorkerPool {
    return new WorkerPool(Array.from({ length: count }, () => new Thread(script, workerData)));
  }

  get size(): number {
    return this.threads.length;
  }

  /** The least loaded thread. */
  get idlest(): Thread {
    const [first, ...others] = this.threads;
    if (first === undefined) throw new RangeError("pool has no threads");
    return others.reduce((best, thread) => (thread.load < best.load ? thread : best), first);
  }

  /** Calls a method on the least loaded thread: see `Thread.call`. */
  async run(method: string, argument: unknown, transfer: readonly Transferable[] = []): Promise<unknown> {
    return await this.idlest.call(method, argument, transfer);
  }

  /** Calls a method on every thread; waits for all, then throws the first error if there was one. */
  async runOnAll(method: string, argument: unknown): Promise<unknown[]> {
    const results = await Promise.allSettled(this.threads.map((thread) => thread.call(method, argument)));
    return results.map((result) => {
      if (result.status === "rejected") throw result.reason;
      return result.value;
    });
  }

  /** Ends all threads. What still waits ends with an error. */
  async stop(): Promise<void> {
    await Promise.all(this.threads.map((thread) => thread.stop()));
  }
}
