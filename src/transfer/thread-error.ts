import { ConnectionError, DamageError, TidemarkError, type Damage } from "../errors/index.js";

/** An error on its way between threads: structured clone keeps neither class nor code. */
export interface ThreadError {
  readonly kind: "damage" | "connection" | "tidemark" | "other";
  readonly code: string;
  readonly message: string;
  readonly hint: string | undefined;
  readonly damage: Damage | undefined;
}

export function toThreadError(error: unknown): ThreadError {
  if (!(error instanceof TidemarkError)) {
    const message = error instanceof Error ? (error.stack ?? error.message) : String(error);
    return { kind: "other", code: "TM_WORKER", message, hint: undefined, damage: undefined };
  }
  const damage = error instanceof DamageError ? error.damage : undefined;
  const kind = damage !== undefined ? "damage" : error instanceof ConnectionError ? "connection" : "tidemark";
  return { kind, code: error.code, message: error.message, hint: error.hint, damage };
}

export function fromThreadError(sent: ThreadError): TidemarkError {
  const details = { hint: sent.hint };
  if (sent.damage !== undefined) return new DamageError(sent.code, sent.message, sent.damage, details);
  if (sent.kind === "connection") return new ConnectionError(sent.code, sent.message, details);
  return new TidemarkError(sent.code, sent.message, details);
}
