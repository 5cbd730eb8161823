import { DamageError, TidemarkError, type ErrorDetails } from "../errors/index.js";

/** The image is sound, as far as can be seen, but uses something that this reader does not do. */
export class UnsupportedImageError extends TidemarkError {
  /** @param object name of the image, as the operator knows it */
  constructor(object: string, what: string, details?: ErrorDetails) {
    super("TM_IMAGE_UNSUPPORTED", `Cannot read image "${object}": it ${what}`, details);
  }
}

/** The image's header or one of its tables contradicts the format or the file's length. */
export class ImageDamageError extends DamageError {
  constructor(object: string, what: string, details?: ErrorDetails) {
    super("TM_IMAGE_DAMAGED", `Cannot read image "${object}": ${what}`, { object }, details);
  }
}

/** The stored bytes of one cluster do not decode to the cluster that was stored. */
export class ClusterDamageError extends DamageError {
  constructor(object: string, at: number, what: string, details?: ErrorDetails) {
    super(
      "TM_CLUSTER_DAMAGED",
      `Cannot decode cluster at byte ${at} of image "${object}": ${what}`,
      { object },
      details,
    );
  }
}

/** What was handed to an image writer cannot become a correct image; the image is to be aborted. */
export class ImageWriteError extends TidemarkError {
  constructor(what: string, details?: ErrorDetails) {
    super("TM_IMAGE_WRITE", `Cannot write image: ${what}`, details);
  }
}
