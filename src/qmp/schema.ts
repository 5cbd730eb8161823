import { QmpProtocolError } from "./errors.js";
import { QmpRecord } from "./record.js";

/** A question to the schema. */
export type SchemaQuestion =
  | { readonly command: string }
  | { readonly event: string }
  /** `argument` is a path through nested members and variants: "bitmaps", "actions.type". */
  | { readonly command: string; readonly argument: string }
  /** Whether an argument that is an enumeration (or a variant's tag) can have a value. */
  | { readonly command: string; readonly argument: string; readonly value: string };

/**
 * QEMU's description of its commands (`query-qmp-schema`), indexed. Features are asked for here instead of
 * guessing them from the version: distributors backport.
 * Specification: docs/devel/qapi-code-gen, "Client JSON Protocol introspection".
 */
export class QmpSchema {
  readonly #entities: ReadonlyMap<string, QmpRecord>;

  private constructor(entities: ReadonlyMap<string, QmpRecord>) {
    this.#entities = entities;
  }

  /** @throws {QmpProtocolError} when `value` is no schema */
  static index(value: unknown): QmpSchema {
    const entities = QmpRecord.listOf(value, "reply to query-qmp-schema");
    return new QmpSchema(new Map(entities.map((entity) => [entity.text("name"), entity])));
  }

  /** Whether QEMU knows the command, event, argument or value. */
  has(question: SchemaQuestion): boolean {
    if ("event" in question) return this.#is(question.event, "event");
    if (!("argument" in question)) return this.#is(question.command, "command");
    const types = this.#typesOf(question.command, question.argument);
    if (!("value" in question)) return types.length > 0;
    return types.some((type) => this.#valuesOf(type).includes(question.value));
  }

  /**
   * Whether NBD exports name their bitmaps also by node (`{"node", "name"}`), not by bare names alone: the
   * element type of `bitmaps` became an alternate in 7.1.
   */
  get exportsBitmapsByNode(): boolean {
    return this.#typesOf("block-export-add", "bitmaps").some((type) => {
      const element = type.optionalText("element-type");
      return element !== undefined && this.#entity(element)?.text("meta-type") === "alternate";
    });
  }

  #entity(name: string): QmpRecord | undefined {
    return this.#entities.get(name);
  }

  #is(name: string, metaType: string): boolean {
    return this.#entity(name)?.text("meta-type") === metaType;
  }

  /** All types that the argument at `path` can have: variants may differ. */
  #typesOf(command: string, path: string): QmpRecord[] {
    const entity = this.#entity(command);
    if (entity?.text("meta-type") !== "command") return [];
    let types = [this.#follow(entity.text("arg-type"))];
    for (const name of path.split(".")) {
      types = types.flatMap((type) => this.#membersOf(type, name));
    }
    return types;
  }

  #membersOf(type: QmpRecord, name: string): QmpRecord[] {
    // A list is looked through: its members are those of its elements.
    const element = type.optionalText("element-type");
    if (element !== undefined) return this.#membersOf(this.#follow(element), name);
    const own = type
      .records("members")
      .filter((member) => member.text("name") === name)
      .map((member) => this.#follow(member.text("type")));
    const ofVariants = type
      .records("variants")
      .flatMap((variant) => this.#membersOf(this.#follow(variant.text("type")), name));
    return [...own, ...ofVariants];
  }

  #follow(name: string): QmpRecord {
    const entity = this.#entity(name);
    if (entity === undefined) throw new QmpProtocolError(`Read QMP schema: type "${name}" is not in it`);
    return entity;
  }

  /** Values of an enumeration: `members` since 7.0, `values` before. */
  #valuesOf(type: QmpRecord): string[] {
    if (type.text("meta-type") !== "enum") return [];
    const values = type.value("values");
    if (Array.isArray(values)) return values.filter((value) => typeof value === "string");
    return type.records("members").map((member) => member.text("name"));
  }
}
