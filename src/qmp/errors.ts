import {
  BusyError,
  ConnectionError,
  NotFoundError,
  ProtocolError,
  RequestError,
  type ErrorDetails,
} from "../errors/index.js";

/** Somebody else holds the monitor: we are queued behind them and were never greeted. */
export class QmpBusyError extends BusyError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_QMP_BUSY", message, details);
  }
}

/** There is no monitor at the address. */
export class QmpNotFoundError extends NotFoundError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_QMP_NOT_FOUND", message, details);
  }
}

/** The connection ended: QEMU is gone, or closed it, or the socket failed. */
export class QmpClosedError extends ConnectionError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_QMP_CLOSED", message, details);
  }
}

/** What came is not QMP; the connection was closed because of it. */
export class QmpProtocolError extends ProtocolError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_QMP_PROTOCOL", message, details);
  }
}

/** QEMU refused one command; the connection still works. */
export class QmpCommandError extends RequestError {
  readonly command: string;
  /** QEMU's error class: nearly always "GenericError", so judge by state, not by this. */
  readonly class: string;
  /** QEMU's own words. */
  readonly description: string;

  constructor(command: string, errorClass: string, description: string) {
    super("TM_QMP_COMMAND", `QEMU refuses ${command}: ${description}`);
    this.command = command;
    this.class = errorClass;
    this.description = description;
  }
}
