import { DamageError, type ErrorDetails } from "../errors/index.js";

/** A file of hashes that is not what was stored: nothing in it is believed. */
export class HashDamageError extends DamageError {
  constructor(object: string, what: string, details?: ErrorDetails) {
    super("TM_HASHES_DAMAGED", `Cannot trust hashes "${object}": ${what}`, { object }, details);
  }
}
