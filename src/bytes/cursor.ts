/**
 * Big-endian cursors: a codec written with them reads like the specification's table.
 * 64-bit fields are `bigint` on the wire and `number` above it, converted here with a range check.
 */

/** Writes the fields of a structure of known size, in the specification's order. */
export class ByteWriter {
  readonly #buffer: Buffer;
  #position = 0;

  /** @param size bytes of the finished structure */
  constructor(size: number) {
    this.#buffer = Buffer.alloc(size);
  }

  u8(value: number): this {
    this.#position = this.#buffer.writeUInt8(value, this.#position);
    return this;
  }

  u16(value: number): this {
    this.#position = this.#buffer.writeUInt16BE(value, this.#position);
    return this;
  }

  u32(value: number): this {
    this.#position = this.#buffer.writeUInt32BE(value, this.#position);
    return this;
  }

  u64(value: number | bigint): this {
    this.#position = this.#buffer.writeBigUInt64BE(BigInt(value), this.#position);
    return this;
  }

  /** Raw bytes; a string is written as UTF-8. */
  bytes(value: Uint8Array | string): this {
    const raw = typeof value === "string" ? Buffer.from(value, "utf8") : value;
    if (this.#position + raw.length > this.#buffer.length) {
      throw new RangeError(`${raw.length} bytes do not fit at ${this.#position} of ${this.#buffer.length}`);
    }
    this.#buffer.set(raw, this.#position);
    this.#position += raw.length;
    return this;
  }

  /** Leaves `count` zero bytes. */
  skip(count: number): this {
    this.#position += count;
    return this;
  }

  /** The structure. @throws {RangeError} when it was not filled exactly */
  finish(): Buffer {
    if (this.#position !== this.#buffer.length) {
      throw new RangeError(`structure has ${this.#buffer.length} bytes, ${this.#position} were written`);
    }
    return this.#buffer;
  }
}

/** Reads the fields of a structure, in the specification's order. Reading past the end throws RangeError. */
export class ByteReader {
  readonly #buffer: Buffer;
  #position = 0;

  constructor(buffer: Buffer) {
    this.#buffer = buffer;
  }

  get remaining(): number {
    return this.#buffer.length - this.#position;
  }

  u8(): number {
    return this.#buffer.readUInt8(this.#advance(1));
  }

  u16(): number {
    return this.#buffer.readUInt16BE(this.#advance(2));
  }

  u32(): number {
    return this.#buffer.readUInt32BE(this.#advance(4));
  }

  /** A 64-bit field kept whole: magics, cookies, flags. */
  u64(): bigint {
    return this.#buffer.readBigUInt64BE(this.#advance(8));
  }

  /** A 64-bit field that must fit in a safe integer: offsets, lengths. @throws {RangeError} when it does not */
  size64(): number {
    const value = this.u64();
    if (value > BigInt(Number.MAX_SAFE_INTEGER))
      throw new RangeError(`64-bit value ${value.toString()} is too large`);
    return Number(value);
  }

  /** A view (not a copy) of the next `count` bytes. */
  bytes(count: number): Buffer {
    const start = this.#advance(count);
    return this.#buffer.subarray(start, start + count);
  }

  /** The next `count` bytes as UTF-8. */
  text(count: number): string {
    return this.bytes(count).toString("utf8");
  }

  skip(count: number): this {
    this.#advance(count);
    return this;
  }

  #advance(count: number): number {
    const start = this.#position;
    if (start + count > this.#buffer.length) {
      throw new RangeError(`${count} bytes wanted at ${start} of ${this.#buffer.length}`);
    }
    this.#position = start + count;
    return start;
  }
}
