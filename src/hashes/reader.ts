import { createHash } from "node:crypto";
import { messageOf } from "../errors/index.js";
import type { ByteSource, IoOptions } from "../bytes/index.js";
import { blockProblem, LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES } from "./block.js";
import { HashDamageError } from "./errors.js";
import {
  CLUSTERS_PER_BLOCK,
  decodeHashesHeader,
  decodeIndexEntry,
  HASHES_HEADER_BYTES,
  INDEX_ENTRY_BYTES,
  type HashesHeader,
} from "./layout.js";

/** What a file of hashes must be, by the manifest of its point. */
export interface HashFileFacts {
  /** As the operator knows the file, for messages. */
  readonly name: string;
  readonly bytes: number;
  /** SHA-256 of the header, hex. */
  readonly sha256: string;
  readonly virtualSize: number;
  readonly clusterSize: number;
  readonly dataClusters: number;
  readonly zeroClusters: number;
}

/** Reads the hashes of one image; every byte is verified before it is believed. */
export class HashReader {
  readonly name: string;
  readonly key: Buffer;
  readonly virtualSize: number;
  readonly clusterSize: number;
  readonly #source: ByteSource;
  readonly #index: Buffer;
  /** Where the block of each entry of the index begins. */
  readonly #offsets: Float64Array;

  private constructor(
    source: ByteSource,
    facts: HashFileFacts,
    key: Buffer,
    index: Buffer,
    offsets: Float64Array,
  ) {
    this.name = facts.name;
    this.key = key;
    this.virtualSize = facts.virtualSize;
    this.clusterSize = facts.clusterSize;
    this.#source = source;
    this.#index = index;
    this.#offsets = offsets;
  }

  /** Reads header and index. @throws {HashDamageError} when they are not what was stored */
  static async open(source: ByteSource, facts: HashFileFacts, options: IoOptions = {}): Promise<HashReader> {
    const damage = (what: string): HashDamageError => new HashDamageError(facts.name, what);
    if (source.length !== facts.bytes || source.length < HASHES_HEADER_BYTES)
      throw damage(`it has ${source.length} bytes, its manifest says ${facts.bytes}`);
    const bytes = await source.read(0, HASHES_HEADER_BYTES, options);
    if (createHash("sha256").update(bytes).digest("hex") !== facts.sha256)
      throw damage("its header is not what was stored");
    const header = decodeHeader(bytes, facts);
    if (typeof header === "string") throw damage(header);
    const length = header.blocks * INDEX_ENTRY_BYTES;
    if (header.indexOffset + length !== source.length) throw damage("its index does not end where it ends");
    const index = length === 0 ? Buffer.alloc(0) : await source.read(header.indexOffset, length, options);
    if (!createHash("sha256").update(index).digest().equals(header.indexDigest))
      throw damage("its index is not what was stored");
    const offsets = placeBlocks(index, header);
    if (typeof offsets === "string") throw damage(offsets);
    return new HashReader(source, facts, header.key, index, offsets);
  }

  /**
   * Reads a block; undefined when the image holds none of its clusters.
   *
   * @throws {HashDamageError} when it is not what was stored
   */
  async block(number: number, options: IoOptions = {}): Promise<Buffer | undefined> {
    const position = this.#find(number);
    const offset = position === undefined ? undefined : this.#offsets[position];
    if (position === undefined || offset === undefined) return undefined;
    const { length, digest } = decodeIndexEntry(this.#index, position);
    const bytes = await this.#source.read(offset, length, options);
    const problem = createHash("sha256").update(bytes).digest().equals(digest)
      ? blockProblem(bytes)
      : "it is not what was stored";
    if (problem === undefined) return bytes;
    throw new HashDamageError(this.name, `${problem}: block ${number} at byte ${offset}`);
  }

  /** Reads every block. @throws {HashDamageError} when one is not what was stored */
  async verify(options: IoOptions = {}): Promise<void> {
    for (let position = 0; position < this.#offsets.length; position += 1) {
      options.signal?.throwIfAborted();
      await this.block(this.#index.readUInt32BE(position * INDEX_ENTRY_BYTES), options);
    }
  }

  /** Position of a block in the index, which is sorted. */
  #find(number: number): number | undefined {
    let low = 0;
    let high = this.#offsets.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#index.readUInt32BE(middle * INDEX_ENTRY_BYTES) < number) low = middle + 1;
      else high = middle;
    }
    if (low === this.#offsets.length) return undefined;
    return this.#index.readUInt32BE(low * INDEX_ENTRY_BYTES) === number ? low : undefined;
  }
}

/** A header that agrees with the manifest, or why there is none. */
function decodeHeader(bytes: Buffer, facts: HashFileFacts): HashesHeader | string {
  let header: HashesHeader | string;
  try {
    header = decodeHashesHeader(bytes);
  } catch (error) {
    return messageOf(error);
  }
  if (typeof header === "string") return header;
  for (const field of ["virtualSize", "clusterSize", "dataClusters", "zeroClusters"] as const) {
    if (header[field] !== facts[field])
      return `its header says ${field} ${header[field]}, the manifest ${facts[field]}`;
  }
  return header;
}

/** Where each block begins, or what is wrong with the index. */
function placeBlocks(index: Buffer, header: HashesHeader): Float64Array | string {
  const { blocks, virtualSize, clusterSize, indexOffset } = header;
  const most = Math.ceil(virtualSize / clusterSize / CLUSTERS_PER_BLOCK);
  const offsets = new Float64Array(blocks);
  let offset = HASHES_HEADER_BYTES;
  let last = -1;
  for (let position = 0; position < blocks; position += 1) {
    const { block, length } = decodeIndexEntry(index, position);
    if (block <= last || block >= most) return `entry ${position} of its index is for block ${block}`;
    if (length < LEAST_BLOCK_BYTES || length > MOST_BLOCK_BYTES)
      return `its block ${block} has ${length} bytes`;
    offsets[position] = offset;
    offset += length;
    last = block;
  }
  return offset === indexOffset ? offsets : "its blocks do not end where its index begins";
}
