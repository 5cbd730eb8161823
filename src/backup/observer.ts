/** What a backup tells while it runs. */
export interface BackupObserver {
  /** A disk's kind was decided; `reason` says why it is full, or compared. */
  disk?(event: {
    readonly name: string;
    readonly kind: "full" | "incremental";
    readonly reason: string | null;
  }): void;
  /** Bytes of a disk that were read, of those that will be. */
  progress?(event: { readonly disk: string; readonly done: number; readonly total: number }): void;
  /** Something that the operator should know and that did not make the backup fail. */
  warning?(message: string): void;
}
