import { BusyError, TidemarkError, type ErrorDetails } from "../errors/index.js";

/** Another run works on the machine, or may: nothing was touched. */
export class RunBusyError extends BusyError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_RUN_BUSY", message, details);
  }
}

/** Another program's NBD server runs in QEMU, which can have only one: it was not touched. */
export class ForeignServerError extends BusyError {
  constructor(why: string, details?: ErrorDetails) {
    super(
      "TM_NBD_SERVER_FOREIGN",
      `Cannot serve the frozen point: QEMU already runs an NBD server of another program (${why}), and it can have only one`,
      {
        hint: "Wait until the other program (a migration, another backup) has ended, or stop its NBD server",
        ...details,
      },
    );
  }
}

/** A job, a migration or another state of the machine is in the way of a backup. */
export class MachineBusyError extends BusyError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_MACHINE_BUSY", message, details);
  }
}

/** The machine, or one of its disks, cannot be backed up in this way at all. */
export class UnsupportedMachineError extends TidemarkError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_MACHINE_UNSUPPORTED", message, details);
  }
}

/** What is read is no longer (or may no longer be) the frozen point. */
export class SnapshotLostError extends TidemarkError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_SNAPSHOT_LOST", message, details);
  }
}

/** The guest overwrites more during the backup than the scratch may hold. */
export class ScratchFullError extends TidemarkError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_SCRATCH_FULL", message, details);
  }
}

/** Nothing protects the machine from this process's death. */
export class GuardError extends TidemarkError {
  constructor(why: string, details?: ErrorDetails) {
    super("TM_GUARD", `Cannot guard the machine against the death of this backup: ${why}`, {
      hint: "Use --allow-unguarded to go on without a guard",
      ...details,
    });
  }
}

/** Something of ours is left in QEMU or on disk; the rest of the teardown was done. */
export class TeardownError extends TidemarkError {
  readonly problems: readonly string[];

  constructor(run: string, problems: readonly string[], cause: unknown) {
    super("TM_TEARDOWN", `Cannot clean up after run ${run}: ${problems.join("; ")}`, {
      cause,
      hint: "The backup's guard, if it has one, goes on with it; else the next backup does, or tidemark cleanup, once the cause is gone",
    });
    this.problems = problems;
  }
}
