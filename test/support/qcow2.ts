import { open, type FileHandle } from "node:fs/promises";
import { KiB, type ByteSource, type HeadLastSink, type IoOptions } from "../../src/bytes/index.js";
import {
  FrameEncoder,
  frameBound,
  ImageReader,
  ImageWriter,
  type FrameBatch,
  type ImageIdentity,
  type ImageSummary,
} from "../../src/qcow2/index.js";

/** An identity like those of real images. */
export const IDENTITY: ImageIdentity = {
  point: "20261120T065009123Z-4f2a91",
  parent: null,
  machine: "web",
  disk: "vda",
  token: "0a1b2c3d",
};

/** A file as the sink of an image. `isHole` tells what may stay a hole: it moves the position, nothing is stored. */
export class FileSink implements HeadLastSink {
  readonly #file: FileHandle;
  readonly #isHole: (bytes: Uint8Array) => boolean;
  #position: number;

  private constructor(file: FileHandle, headLength: number, isHole: (bytes: Uint8Array) => boolean) {
    this.#file = file;
    this.#position = headLength;
    this.#isHole = isHole;
  }

  static async create(
    path: string,
    headLength: number,
    isHole: (bytes: Uint8Array) => boolean = () => false,
  ): Promise<FileSink> {
    return new FileSink(await open(path, "wx"), headLength, isHole);
  }

  async append(bytes: Uint8Array): Promise<void> {
    if (!this.#isHole(bytes)) await this.#file.write(bytes, 0, bytes.length, this.#position);
    this.#position += bytes.length;
  }

  async commit(head: Uint8Array): Promise<void> {
    await this.#file.write(head, 0, head.length, 0);
    await this.#file.truncate(this.#position);
    await this.#file.close();
  }

  async abort(): Promise<void> {
    await this.#file.close();
  }
}

/** Memory as the sink of an image, and afterwards as its source. */
export class MemoryImage implements HeadLastSink, ByteSource {
  #parts: Buffer[];
  #state: "open" | "committed" | "aborted" = "open";

  constructor(headLength: number) {
    this.#parts = [Buffer.alloc(headLength)];
  }

  get state(): "open" | "committed" | "aborted" {
    return this.#state;
  }

  /** What was appended so far, behind room for the head; after the commit, the image. */
  get bytes(): Buffer {
    if (this.#parts.length > 1) this.#parts = [Buffer.concat(this.#parts)];
    return this.#parts[0]!;
  }

  get length(): number {
    return this.bytes.length;
  }

  append(bytes: Uint8Array): Promise<void> {
    this.#parts.push(Buffer.from(bytes));
    return Promise.resolve();
  }

  commit(head: Uint8Array): Promise<void> {
    this.bytes.set(head);
    this.#state = "committed";
    return Promise.resolve();
  }

  abort(): Promise<void> {
    if (this.#state === "open") this.#state = "aborted";
    return Promise.resolve();
  }

  read(offset: number, length: number): Promise<Buffer> {
    if (offset + length > this.length) {
      return Promise.reject(new Error(`${length} bytes at ${offset} of ${this.length} were wanted`));
    }
    return Promise.resolve(Buffer.from(this.bytes.subarray(offset, offset + length)));
  }
}

/** A file as the source of an image. */
export class FileSource implements ByteSource, AsyncDisposable {
  readonly length: number;
  readonly #file: FileHandle;

  private constructor(file: FileHandle, length: number) {
    this.#file = file;
    this.length = length;
  }

  static async open(path: string): Promise<FileSource> {
    const file = await open(path, "r");
    return new FileSource(file, (await file.stat()).size);
  }

  async read(offset: number, length: number, _options?: IoOptions): Promise<Buffer> {
    const buffer = Buffer.alloc(length);
    const { bytesRead } = await this.#file.read(buffer, 0, length, offset);
    if (bytesRead !== length) throw new Error(`${length} bytes at ${offset} of ${this.length} were wanted`);
    return buffer;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#file.close();
  }
}

/** Opens images for reading, top first, and closes their files in the end. */
export async function openImages(
  paths: readonly string[],
): Promise<{ readonly images: readonly ImageReader[] } & AsyncDisposable> {
  const sources = await Promise.all(paths.map((path) => FileSource.open(path)));
  const images = await Promise.all(
    sources.map((source, index) => ImageReader.open(source, { name: paths[index] })),
  );
  return {
    images,
    [Symbol.asyncDispose]: async () => {
      for (const source of sources) await source[Symbol.asyncDispose]();
    },
  };
}

/** Encodes clusters, given by their numbers, as one batch. */
export function encodeBatch(
  clusters: readonly (readonly [cluster: number, content: Uint8Array])[],
  level = 1,
): FrameBatch {
  const encoder = new FrameEncoder(level);
  const parts: Buffer[] = [];
  const frames = clusters.map(([cluster, content]) => {
    const into = Buffer.alloc(frameBound(content.length));
    const length = encoder.encode(content, into, 0);
    parts.push(into.subarray(0, length));
    return { cluster, length };
  });
  return { payload: Buffer.concat(parts), frames };
}

/** What an image is to hold, cluster by cluster; what is not named stays unallocated. */
export interface ImagePlan {
  readonly virtualSize: number;
  readonly clusterSize?: number;
  readonly backing?: string | undefined;
  readonly segmentBytes?: number;
  /** In the order of writing. "seal" seals at that cluster. */
  readonly steps: readonly (readonly [cluster: number, content: Uint8Array | "zero" | "seal"])[];
  readonly isHole?: (bytes: Uint8Array) => boolean;
}

/** Writes an image to a file with ImageWriter. */
export async function writeImage(path: string, plan: ImagePlan): Promise<ImageSummary> {
  return await writeTo(await FileSink.create(path, plan.clusterSize ?? 64 * KiB, plan.isHole), plan);
}

/** Writes an image to a sink with ImageWriter. */
export async function writeTo(sink: HeadLastSink, plan: ImagePlan): Promise<ImageSummary> {
  const { virtualSize, clusterSize = 64 * KiB, backing, segmentBytes, steps } = plan;
  const writer = ImageWriter.create(sink, {
    virtualSize,
    clusterSize,
    identity: IDENTITY,
    backing: backing === undefined ? undefined : { file: backing, format: "qcow2" },
    segmentBytes,
  });
  try {
    for (const [cluster, content] of steps) {
      if (content === "zero") writer.zero(cluster, 1);
      else if (content === "seal") await writer.seal(cluster);
      else await writer.append(encodeBatch([[cluster, content]]));
    }
    return await writer.finish();
  } catch (error) {
    await writer.abort();
    throw error;
  }
}

/** Lays the steps of one image over `model`, the bytes of the disk below it. */
export function overlay(model: Buffer, clusterSize: number, steps: ImagePlan["steps"]): void {
  for (const [cluster, content] of steps) {
    if (content === "seal") continue;
    const at = cluster * clusterSize;
    if (content === "zero") model.fill(0, at, Math.min(at + clusterSize, model.length));
    else model.set(content.subarray(0, Math.min(clusterSize, model.length - at)), at);
  }
}

/** The bytes of a disk that changed its size: cut, or lengthened by zeroes. */
export function resized(model: Buffer, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  model.copy(bytes);
  return bytes;
}

/** One cluster of bytes that tell their cluster, their layer and their place. */
export function clusterContent(clusterSize: number, cluster: number, layer: number): Buffer {
  const bytes = Buffer.alloc(clusterSize);
  for (let at = 0; at < clusterSize; at += 16) {
    bytes.writeUInt32LE((cluster * 2654435761) >>> 0, at);
    bytes.writeUInt32LE(layer + 1, at + 4);
    bytes.writeUInt32LE(at, at + 8);
  }
  return bytes;
}
