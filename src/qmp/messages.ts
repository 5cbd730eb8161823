import { QmpProtocolError } from "./errors.js";
import type { QmpEvent } from "./events.js";
import { QmpRecord } from "./record.js";

/** What QEMU says first. */
export interface QmpGreeting {
  readonly version: { readonly major: number; readonly minor: number; readonly micro: number };
  /** The distributor's name for the build; often empty. */
  readonly package: string;
  readonly capabilities: readonly string[];
}

/** One message of the server. */
export type ServerMessage =
  | { readonly kind: "greeting"; readonly greeting: QmpGreeting }
  | { readonly kind: "return"; readonly id: unknown; readonly value: unknown }
  | { readonly kind: "error"; readonly id: unknown; readonly class: string; readonly description: string }
  | { readonly kind: "event"; readonly event: QmpEvent };

/**
 * Decodes one message: greeting `{"QMP"}`, `{"return","id"}`, `{"error":{"class","desc"},"id"}` or
 * `{"event","data","timestamp"}`. An error may lack its id: QEMU could not even parse the command.
 *
 * @throws {QmpProtocolError} for anything else
 */
export function decodeMessage(text: string): ServerMessage {
  const message = QmpRecord.of(parseJson(text), "message of the monitor");
  if (message.has("QMP")) return { kind: "greeting", greeting: decodeGreeting(message.record("QMP")) };
  if (message.has("event")) return { kind: "event", event: decodeEvent(message) };
  if (message.has("return")) {
    return { kind: "return", id: message.value("id"), value: message.value("return") };
  }
  if (message.has("error")) {
    const error = message.record("error");
    return {
      kind: "error",
      id: message.value("id"),
      class: error.text("class"),
      description: error.text("desc"),
    };
  }
  throw new QmpProtocolError(`Read from monitor: neither greeting, reply nor event: ${excerpt(text)}`);
}

/** The id of a message; undefined when it has none, or is no message at all but the rest of one. */
export function idOf(text: string): unknown {
  try {
    const message: unknown = JSON.parse(text);
    return typeof message === "object" && message !== null && "id" in message ? message.id : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** The bytes of a command, one line. `id` is of our choice and comes back with the reply. */
export function encodeCommand(id: number, command: string, args: object | undefined): string {
  return `${JSON.stringify({ execute: command, ...(args === undefined ? {} : { arguments: args }), id })}\n`;
}

/** The beginning of what a peer sent, safe to print. */
export function excerpt(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text);
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch (cause) {
    throw new QmpProtocolError(`Read from monitor: not JSON: ${excerpt(text)}`, {
      cause,
      hint: "Give the path of a QMP monitor (-qmp, or -mon mode=control), not of another socket",
    });
  }
}

function decodeGreeting(record: QmpRecord): QmpGreeting {
  const version = record.record("version");
  const qemu = version.record("qemu");
  return {
    version: { major: qemu.size("major"), minor: qemu.size("minor"), micro: qemu.size("micro") },
    package: version.optionalText("package") ?? "",
    capabilities: record.list("capabilities").filter((item) => typeof item === "string"),
  };
}

function decodeEvent(message: QmpRecord): QmpEvent {
  return { name: message.text("event"), data: message.optionalRecord("data")?.fields ?? {} };
}
