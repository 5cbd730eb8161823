import { parentPort } from "node:worker_threads";
import { toThreadError, type ThreadError } from "./thread-error.js";

/** A call to a worker: which method, with what. */
export interface ThreadCall {
  readonly id: number;
  readonly method: string;
  readonly argument: unknown;
}

/** The worker's answer to the call of that id. */
export type ThreadReply = { readonly id: number } & (
  { readonly value: unknown } | { readonly error: ThreadError }
);

/** What a method returns: its value, and the buffers in it that change hands instead of being copied. */
export interface ThreadResult {
  readonly value: unknown;
  readonly transfer?: readonly ArrayBuffer[];
}

/** The methods that a worker offers. The caller knows their types; see the pool that belongs to each worker. */
export type ThreadMethods = Readonly<
  Record<string, (argument: never) => ThreadResult | Promise<ThreadResult>>
>;

/** Answers calls from the main thread until it ends this worker. Calls may overlap. */
export function serveThread(methods: ThreadMethods): void {
  const port = parentPort;
  if (port === null) throw new Error("serveThread() belongs in a worker thread");
  const answer = async ({ id, method, argument }: ThreadCall): Promise<void> => {
    try {
      const run = methods[method];
      if (run === undefined) throw new Error(`worker has no method ${method}`);
      const { value, transfer } = await run(argument as never);
      port.postMessage({ id, value } satisfies ThreadReply, transfer ?? []);
    } catch (error) {
      port.postMessage({ id, error: toThreadError(error) } satisfies ThreadReply);
    }
  };
  port.on("message", (call: ThreadCall) => void answer(call));
}
