/** Options of everything that does I/O. */
export interface IoOptions {
  readonly signal?: AbortSignal | undefined;
}

/** Options of reading. */
export interface ReadOptions extends IoOptions {
  /** Memory of exactly the length that is read: the source may read into it and return it, or make new memory. */
  readonly into?: Buffer | undefined;
}

/** Bytes that can be read at any offset: an image in a repository, a file, a disk. */
export interface ByteSource {
  /** Bytes in all. */
  readonly length: number;
  /**
   * Reads exactly `length` bytes at `offset`; never fewer.
   * The buffer belongs to the caller. Reading past the end is an error.
   */
  read(offset: number, length: number, options?: ReadOptions): Promise<Buffer>;
}

/** Fills `into` with the bytes at `offset`, copying them only where the source made memory of its own. */
export async function readInto(
  source: ByteSource,
  offset: number,
  into: Buffer,
  { signal }: IoOptions = {},
): Promise<void> {
  const bytes = await source.read(offset, into.length, { signal, into });
  if (bytes.buffer !== into.buffer || bytes.byteOffset !== into.byteOffset) bytes.copy(into);
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
