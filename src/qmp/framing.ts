import { MiB } from "../bytes/index.js";
import { QmpProtocolError } from "./errors.js";

/** The longest message that is accepted: far above a schema (200 KiB) or any node list. */
export const LONGEST_MESSAGE = 64 * MiB;

const LINE_FEED = 0x0a;

/**
 * Cuts the byte stream of a monitor into messages. QEMU ends each with CR LF. A monitor with `pretty=on`
 * spreads one over many lines, beginning with a line "{" and ending with a line "}": joined here.
 */
export class MessageFraming {
  readonly #limit: number;
  #parts: Buffer[] = [];
  #length = 0;
  #pretty: string[] | undefined;
  #prettyLength = 0;

  constructor(limit = LONGEST_MESSAGE) {
    this.#limit = limit;
  }

  /**
   * Takes what arrived and yields the messages that are complete.
   *
   * @throws {QmpProtocolError} when a message is longer than the limit
   */
  *push(chunk: Buffer): Generator<string> {
    let rest = chunk;
    for (let end = rest.indexOf(LINE_FEED); end >= 0; end = rest.indexOf(LINE_FEED)) {
      this.#add(rest.subarray(0, end));
      const line = Buffer.concat(this.#parts, this.#length).toString("utf8").trimEnd();
      this.#parts = [];
      this.#length = 0;
      rest = rest.subarray(end + 1);
      const message = this.#join(line);
      if (message !== undefined) yield message;
    }
    if (rest.length > 0) this.#add(rest);
  }

  /** The first bytes of an unfinished message: enough to see that it can never be one. */
  get unfinished(): string {
    return (this.#parts[0]?.subarray(0, 64) ?? Buffer.alloc(0)).toString("utf8");
  }

  #add(part: Buffer): void {
    this.#length += part.length;
    this.#assertBounded(this.#length);
    this.#parts.push(part);
  }

  #join(line: string): string | undefined {
    if (this.#pretty === undefined) {
      if (line !== "{") return line === "" ? undefined : line;
      this.#pretty = [];
      this.#prettyLength = 0;
    }
    this.#pretty.push(line);
    this.#prettyLength += line.length;
    this.#assertBounded(this.#prettyLength);
    if (line !== "}") return undefined;
    const message = this.#pretty.join("\n");
    this.#pretty = undefined;
    return message;
  }

  #assertBounded(length: number): void {
    if (length <= this.#limit) return;
    throw new QmpProtocolError(
      `Read from monitor: message has more than ${this.#limit} bytes without an end`,
    );
  }
}
