/**
 * A disk that is there already and is written in place: a device, a file, an NBD export. What is written may be
 * under way until `settle`.
 */
export interface DiskAccess {
  /** Bytes; Infinity for a file, which grows. */
  readonly size: number;
  /** Changes are made in multiples of this many bytes, at multiples of it. */
  readonly blockSize: number;
  read(offset: number, length: number): Promise<Buffer>;
  /** The buffer must not change until `settle` has resolved. */
  write(offset: number, bytes: Buffer): Promise<void>;
  writeZeroes(offset: number, length: number): Promise<void>;
  /** Resolves when nothing is under way. @throws what any write before met */
  settle(): Promise<void>;
  /** Resolves when all that was written will last. @throws what any write before met */
  flush(): Promise<void>;
  /** Lets go of it. Never throws. */
  close(): Promise<void>;
}
