import type { IoOptions } from "../../bytes/index.js";
import { TidemarkError } from "../../errors/index.js";
import type { DriverOptions, EventWatch, QmpClient } from "../../qmp/index.js";

/** How long QEMU may take to end a job, in milliseconds. */
const JOB_DEADLINE = 60_000;

/**
 * Creates an image in QEMU and waits until it is there.
 *
 * @param id of the job
 * @param image options of `blockdev-create`
 * @throws {TidemarkError} TM_QEMU_JOB with QEMU's words when the job fails
 */
export async function runJob(
  qmp: QmpClient,
  id: string,
  image: DriverOptions,
  options: IoOptions = {},
): Promise<void> {
  using watch = watchJob(qmp, id);
  await qmp.execute("blockdev-create", { "job-id": id, options: image }, options);
  await waitConcluded(qmp, id, watch, options);
  const error = (await qmp.execute("query-jobs")).find((job) => job.id === id)?.error;
  await qmp.execute("job-dismiss", { id });
  if (error !== undefined) {
    throw new TidemarkError("TM_QEMU_JOB", `Create ${image.driver} image in QEMU: ${error}`, {
      hint: "QEMU itself makes the scratch file: its user must be able to write in that directory",
    });
  }
}

/** Collects the changes of a job's status; make it before the command that causes them. */
export function watchJob(qmp: QmpClient, id: string): EventWatch {
  return qmp.watch(({ name, data }) => name === "JOB_STATUS_CHANGE" && data["id"] === id);
}

/** Waits until a job has concluded, or is gone. */
export async function waitConcluded(
  qmp: QmpClient,
  id: string,
  watch: EventWatch,
  options: IoOptions = {},
): Promise<void> {
  const started = Date.now();
  for (;;) {
    const job = (await qmp.execute("query-jobs", undefined, options)).find((item) => item.id === id);
    if (job === undefined || job.status === "concluded") return;
    await watch.next({ ...options, timeoutMs: Math.max(1, started + JOB_DEADLINE - Date.now()) });
  }
}
