/** A run that holds no stored bytes. */
export interface EmptyMapping<Kind extends "unallocated" | "zero"> {
  /** Offset in the disk, bytes. */
  readonly offset: number;
  readonly length: number;
  readonly kind: Kind;
}

/** A run stored as it is. */
export interface PlainMapping {
  readonly offset: number;
  readonly length: number;
  readonly kind: "plain";
  /** Host offset of its first byte. */
  readonly at: number;
}

/** One compressed cluster, or the part of it that was asked for. */
export interface CompressedMapping {
  readonly offset: number;
  readonly length: number;
  readonly kind: "compressed";
  /** Host offset of the compressed data. */
  readonly at: number;
  /** Upper bound of its length in bytes: an L2 entry counts sectors. Never reaches beyond the file. */
  readonly storedLength: number;
  /** Bytes of the decoded cluster before `offset`: 0 unless the range asked for begins inside the cluster. */
  readonly skip: number;
}

/** What one image says about a run of the disk. "unallocated": the backing file decides. */
export type Mapping = EmptyMapping<"unallocated"> | EmptyMapping<"zero"> | PlainMapping | CompressedMapping;

/** What a chain says about a run: `image` is the index of the image that holds it, 0 being the top. */
export type ChainMapping =
  | EmptyMapping<"zero">
  | (PlainMapping & { readonly image: number })
  | (CompressedMapping & { readonly image: number });

/** The part of a mapping that lies in [start, end). Both must lie within it. */
export function clip<M extends Mapping | ChainMapping>(mapping: M, start: number, end: number): M {
  if (start <= mapping.offset && end >= mapping.offset + mapping.length) return mapping;
  const before = Math.max(0, start - mapping.offset);
  const length = Math.min(mapping.offset + mapping.length, end) - (mapping.offset + before);
  const clipped = { ...mapping, offset: mapping.offset + before, length };
  if (mapping.kind === "plain") return { ...clipped, at: mapping.at + before };
  if (mapping.kind === "compressed") return { ...clipped, skip: mapping.skip + before };
  return clipped;
}

/** One run for two that follow each other, where they are one: undefined where they are not. */
export function join<M extends Mapping | ChainMapping>(first: M, second: M): M | undefined {
  if (first.kind !== second.kind || first.kind === "compressed") return undefined;
  if (first.kind === "plain" && second.kind === "plain") {
    const isInFirst = "image" in first && "image" in second ? first.image === second.image : true;
    if (!isInFirst || second.at !== first.at + first.length) return undefined;
  }
  return { ...first, length: first.length + second.length };
}
