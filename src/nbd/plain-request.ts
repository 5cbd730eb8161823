import { faultOf, NbdRequestError, type Fault } from "./errors.js";
import type { Request, RequestOwner } from "./request.js";

/** What goes on the wire of a request that is answered without payload. */
export interface PlainFields {
  /** NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLUSH */
  readonly type: number;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** The bytes of a write. */
  readonly payload?: Buffer | undefined;
}

/** A request whose answer is yes or an error: it changes the export, or makes changes last. */
export class PlainRequest implements Request {
  readonly type: number;
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  readonly payload: Buffer | undefined;
  readonly fault: Fault;
  readonly #action: string;
  readonly #owner: RequestOwner<PlainRequest>;
  #failure: NbdRequestError | undefined;

  /** @param action for messages: `Cannot write 512 bytes at 0 of export "sda"` */
  constructor(fields: PlainFields, action: string, owner: RequestOwner<PlainRequest>) {
    this.type = fields.type;
    this.flags = fields.flags;
    this.offset = fields.offset;
    this.length = fields.length;
    this.payload = fields.payload;
    this.#action = action;
    this.#owner = owner;
    this.fault = faultOf(action);
  }

  get failure(): NbdRequestError | undefined {
    return this.#failure;
  }

  content(): Buffer {
    return this.fault("TM_NBD_REPLY_TYPE", "server answered with content, there is none to be had");
  }

  status(): void {
    this.fault("TM_NBD_REPLY_TYPE", "server answered with block status, which was not asked for");
  }

  failed(errno: number, text: string): void {
    this.#failure ??= new NbdRequestError(this.#action, errno, text);
  }

  done(): void {
    this.#owner.settle(this, this.#failure);
  }

  lost(reason: Error): void {
    this.#owner.lost(reason);
  }
}
