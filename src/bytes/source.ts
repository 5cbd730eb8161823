/** Options of everything that does I/O. */
export interface IoOptions {
  readonly signal?: AbortSignal | undefined;
}

/** Bytes that can be read at any offset: an image in a repository, a file, a disk. */
export interface ByteSource {
  /** Bytes in all. */
  readonly length: number;
  /**
   * Reads exactly `length` bytes at `offset`; never fewer.
   * The buffer belongs to the caller. Reading past the end is an error.
   */
  read(offset: number, length: number, options?: IoOptions): Promise<Buffer>;
}

/**
 * An object written front to back, except that its first `headLength` bytes come last, in `commit`.
 * Nothing can seek: an S3 multipart upload (first part held back) fits as well as a file.
 * The first `append` lands at offset `headLength`.
 */
export interface HeadLastSink {
  /** Appends; the buffer may be reused by the caller once the promise resolves. */
  append(bytes: Uint8Array): Promise<void>;
  /** Writes the first bytes (exactly `headLength`) and makes the object durable and visible, in one step. */
  commit(head: Uint8Array): Promise<void>;
  /** Drops everything. Never throws; harmless after `commit`. */
  abort(): Promise<void>;
}
