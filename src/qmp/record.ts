import { QmpProtocolError } from "./errors.js";

/**
 * A JSON object of the peer, read field by field with a check of each: what is wrong names the field, and
 * nothing unchecked goes further.
 */
export class QmpRecord {
  readonly fields: Readonly<Record<string, unknown>>;
  readonly #what: string;

  private constructor(fields: Readonly<Record<string, unknown>>, what: string) {
    this.fields = fields;
    this.#what = what;
  }

  /**
   * @param what what the object is, for messages: "reply to query-jobs"
   * @throws {QmpProtocolError} when `value` is no object
   */
  static of(value: unknown, what: string): QmpRecord {
    if (typeof value === "object" && value !== null && !Array.isArray(value)) {
      return new QmpRecord(value as Record<string, unknown>, what);
    }
    throw new QmpProtocolError(`Read ${what}: expected an object, got ${nameOf(value)}`);
  }

  /** Reads a list of objects. @throws {QmpProtocolError} when it is none */
  static listOf(value: unknown, what: string): QmpRecord[] {
    if (!Array.isArray(value)) {
      throw new QmpProtocolError(`Read ${what}: expected a list, got ${nameOf(value)}`);
    }
    return value.map((item) => QmpRecord.of(item, what));
  }

  has(name: string): boolean {
    return this.value(name) !== undefined;
  }

  /** The field as it is; undefined when it is absent. */
  value(name: string): unknown {
    return Object.hasOwn(this.fields, name) ? this.fields[name] : undefined;
  }

  text(name: string): string {
    return this.optionalText(name) ?? this.#wrong(name, "a string");
  }

  optionalText(name: string): string | undefined {
    const value = this.value(name);
    if (value === undefined || typeof value === "string") return value;
    return this.#wrong(name, "a string");
  }

  flag(name: string): boolean {
    const value = this.value(name);
    return typeof value === "boolean" ? value : this.#wrong(name, "true or false");
  }

  /** A field that came with a later QEMU than the oldest supported one. */
  optionalFlag(name: string): boolean | undefined {
    return this.has(name) ? this.flag(name) : undefined;
  }

  /** A number of bytes or things: a non-negative integer that JavaScript holds exactly. */
  size(name: string): number {
    const value = this.value(name);
    if (typeof value === "number" && Number.isSafeInteger(value) && value >= 0) return value;
    return this.#wrong(name, "a non-negative integer below 2^53");
  }

  list(name: string): readonly unknown[] {
    const value = this.value(name);
    return Array.isArray(value) ? value : this.#wrong(name, "a list");
  }

  record(name: string): QmpRecord {
    return this.optionalRecord(name) ?? this.#wrong(name, "an object");
  }

  optionalRecord(name: string): QmpRecord | undefined {
    const value = this.value(name);
    return value === undefined ? undefined : QmpRecord.of(value, `"${name}" of ${this.#what}`);
  }

  /** The objects of a list; none when the field is absent. */
  records(name: string): QmpRecord[] {
    const value = this.value(name);
    return value === undefined ? [] : QmpRecord.listOf(value, `"${name}" of ${this.#what}`);
  }

  #wrong(name: string, expected: string): never {
    throw new QmpProtocolError(
      `Read ${this.#what}: expected ${expected} in "${name}", got ${nameOf(this.value(name))}`,
    );
  }
}

function nameOf(value: unknown): string {
  if (value === undefined) return "nothing";
  if (value === null) return "null";
  if (Array.isArray(value)) return "a list";
  return typeof value === "object" ? "an object" : JSON.stringify(value).slice(0, 40);
}
