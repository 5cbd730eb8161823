import type { Fault, NbdRequestError } from "./errors.js";

/** A request in flight, as the parser of replies sees it. */
export interface Request {
  readonly type: number;
  readonly flags: number;
  /** What goes on the wire: aligned to the export's minimum block size. */
  readonly offset: number;
  readonly length: number;
  /** What follows the head of the request: as long as `length`. Writes only. */
  readonly payload?: Buffer | undefined;
  /** Throws the protocol error of this request. */
  readonly fault: Fault;
  /** Where the content at [offset, offset + length) of the export goes. Reads only. */
  content(offset: number, length: number): Buffer;
  /** Takes a block status payload, of one of its two forms. Block status requests only. */
  status(contextId: number, payload: Buffer, isExtended: boolean): void;
  /** The server's refusal; undefined as long as all goes well. */
  readonly failure: NbdRequestError | undefined;
  /** Takes an error of the server. More may come until `done`. */
  failed(errno: number, text: string): void;
  /** Takes the news that the reply is complete. Throws the protocol error of one that is not. */
  done(): void;
  /** Takes the end of the connection. */
  lost(reason: Error): void;
}

/** Whose requests these are; told how they end. */
export interface RequestOwner<T> {
  /** The request succeeded, or the server refused it. */
  settle(request: T, failure: NbdRequestError | undefined): void;
  /** The connection is gone. */
  lost(reason: Error): void;
}
