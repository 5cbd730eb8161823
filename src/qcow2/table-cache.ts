/** Tables of one image by their host offset, the least recently used leaving first. */
export class TableCache {
  readonly #limit: number;
  readonly #tables = new Map<number, Buffer>();
  #bytes = 0;
  #newest = -1;

  /** @param limit bytes; one table is kept even if it alone exceeds them */
  constructor(limit: number) {
    this.#limit = limit;
  }

  get(offset: number): Buffer | undefined {
    const table = this.#tables.get(offset);
    if (table !== undefined && offset !== this.#newest) {
      this.#tables.delete(offset);
      this.#tables.set(offset, table);
      this.#newest = offset;
    }
    return table;
  }

  set(offset: number, table: Buffer): void {
    this.#bytes += table.length - (this.#tables.get(offset)?.length ?? 0);
    this.#tables.delete(offset);
    this.#tables.set(offset, table);
    this.#newest = offset;
    for (const [oldest, bytes] of this.#tables) {
      if (this.#bytes <= this.#limit || oldest === offset) break;
      this.#tables.delete(oldest);
      this.#bytes -= bytes.length;
    }
  }
}
