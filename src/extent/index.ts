/** Extents: ranges of bytes of a disk, and the laws of joining, cutting and widening lists of them. */
export {
  chop,
  endOf,
  intersect,
  normalize,
  subtract,
  totalLength,
  union,
  widen,
  type Extent,
} from "./extent.js";
