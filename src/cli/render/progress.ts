import { MultiBar, type SingleBar } from "cli-progress";
import { formatSize } from "../../bytes/index.js";

/** Shows how far each disk is; on a terminal only. */
export interface Progress {
  update(disk: string, done: number, total: number): void;
  /** Clears the bars: call it before anything else is printed. */
  stop(): void;
}

/** Bars, one per disk: share, bytes, rate, time left. */
export function progressBars(stream: NodeJS.WriteStream): Progress {
  const bars = new MultiBar(
    {
      stream,
      format: "  {disk} [{bar}] {percentage}%  {done} of {size}  {rate}/s  {left}",
      barsize: 24,
      barCompleteChar: "=",
      barIncompleteChar: " ",
      hideCursor: true,
      clearOnComplete: true,
      fps: 4,
    },
    { format: "" } as never,
  );
  const started = performance.now();
  const shown = new Map<string, SingleBar>();
  return {
    update(disk, done, total) {
      const seconds = Math.max((performance.now() - started) / 1000, 0.001);
      const rate = done / seconds;
      const left = rate > 0 && done < total ? `${Math.ceil((total - done) / rate)} s left` : "";
      const payload = {
        disk: disk.padEnd(12),
        done: formatSize(done),
        size: formatSize(total),
        rate: formatSize(rate),
        left,
      };
      const bar = shown.get(disk) ?? bars.create(Math.max(total, 1), 0, payload);
      shown.set(disk, bar);
      bar.setTotal(Math.max(total, 1));
      bar.update(total === 0 ? 1 : done, payload);
    },
    stop() {
      bars.stop();
    },
  };
}

/** For pipes, files and `--no-progress`. */
export const NO_PROGRESS: Progress = { update: () => undefined, stop: () => undefined };
