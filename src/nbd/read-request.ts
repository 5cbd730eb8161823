import { NBD_CMD_FLAG_DF, NBD_CMD_READ, NBD_EOVERFLOW } from "./constants.js";
import { faultOf, NbdRequestError, type Fault } from "./errors.js";
import type { Request, RequestOwner } from "./request.js";

/** Disjoint pieces in which one reply may lie about; an orderly server needs one or two. */
const MAX_FRAGMENTS = 4096;

/** NBD_CMD_READ of one stretch, straight into its place. */
export class ReadRequest implements Request {
  readonly type = NBD_CMD_READ;
  readonly flags: number;
  readonly offset: number;
  readonly target: Buffer;
  readonly fault: Fault;
  readonly #action: string;
  readonly #owner: RequestOwner<ReadRequest>;
  /** What has come: sorted, disjoint, not touching. */
  readonly #covered: { from: number; to: number }[] = [];
  #failure: NbdRequestError | undefined;

  constructor(
    exportName: string,
    offset: number,
    target: Buffer,
    dontFragment: boolean,
    owner: RequestOwner<ReadRequest>,
  ) {
    this.flags = dontFragment ? NBD_CMD_FLAG_DF : 0;
    this.offset = offset;
    this.target = target;
    this.#owner = owner;
    this.#action = `Cannot read ${target.length} bytes at ${offset} of export ${JSON.stringify(exportName)}`;
    this.fault = faultOf(this.#action);
  }

  get length(): number {
    return this.target.length;
  }

  /** Whether the server refused because of NBD_CMD_FLAG_DF: the same read without it may do. */
  get isTooLargeForOnePiece(): boolean {
    return this.flags === NBD_CMD_FLAG_DF && this.#failure?.errno === NBD_EOVERFLOW;
  }

  get failure(): NbdRequestError | undefined {
    return this.#failure;
  }

  content(offset: number, length: number): Buffer {
    const from = offset - this.offset;
    const to = from + length;
    if (from < 0 || to > this.length) {
      this.fault("TM_NBD_REPLY_OFFSET", `server sent ${length} bytes at ${offset}, outside the request`);
    }
    this.#cover(from, to);
    return this.target.subarray(from, to);
  }

  status(): void {
    this.fault("TM_NBD_REPLY_TYPE", "server answered a read with block status");
  }

  failed(errno: number, text: string): void {
    this.#failure ??= new NbdRequestError(this.#action, errno, text);
  }

  done(): void {
    if (this.#failure === undefined) {
      const [first] = this.#covered;
      if (first?.from !== 0 || first.to !== this.length) {
        const got = this.#covered.reduce((sum, piece) => sum + piece.to - piece.from, 0);
        this.fault("TM_NBD_SHORT_READ", `server sent ${got} of ${this.length} bytes and called it complete`);
      }
    }
    this.#owner.settle(this, this.#failure);
  }

  lost(reason: Error): void {
    this.#owner.lost(reason);
  }

  /** "MUST NOT overlap with the bounds of any earlier content chunk" */
  #cover(from: number, to: number): void {
    const pieces = this.#covered;
    let index = pieces.length;
    while (index > 0 && (pieces[index - 1]?.from ?? 0) >= to) index -= 1;
    const before = pieces[index - 1];
    const after = pieces[index];
    if (before !== undefined && before.to > from) {
      this.fault("TM_NBD_REPLY_OVERLAP", `server sent the bytes from ${this.offset + from} twice`);
    }
    if (before?.to === from) {
      before.to = to;
      if (after?.from === to) {
        before.to = after.to;
        pieces.splice(index, 1);
      }
    } else if (after?.from === to) after.from = from;
    else if (pieces.length < MAX_FRAGMENTS) pieces.splice(index, 0, { from, to });
    else this.fault("TM_NBD_REPLY_FRAGMENTS", `server sent more than ${MAX_FRAGMENTS} fragments`);
  }
}
