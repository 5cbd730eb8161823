import { ConnectionError, NotFoundError } from "../../errors/index.js";
import { QmpClient, type QmpAddress } from "../../qmp/index.js";

/** A way to QEMU for a teardown; disposing of it closes what was opened for it. */
export interface Reached extends AsyncDisposable {
  /** undefined: QEMU is gone. */
  readonly qmp: QmpClient | undefined;
}

/**
 * The connection if it still works, else a new one: QEMU may live although its monitor hung up on us. Nothing
 * listening any more says that QEMU is gone.
 *
 * @throws {BusyError} when another client has taken the monitor
 */
export async function reach(qmp: QmpClient | undefined, address: QmpAddress): Promise<Reached> {
  try {
    await qmp?.execute("query-version");
    if (qmp !== undefined) return { qmp, [Symbol.asyncDispose]: () => Promise.resolve() };
  } catch (error) {
    if (!(error instanceof ConnectionError)) throw error;
  }
  try {
    const again = await QmpClient.connect(address);
    return { qmp: again, [Symbol.asyncDispose]: () => again.close() };
  } catch (error) {
    if (!(error instanceof NotFoundError)) throw error;
    return { qmp: undefined, [Symbol.asyncDispose]: () => Promise.resolve() };
  }
}
