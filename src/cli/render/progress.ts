import { MultiBar, Presets, type SingleBar } from "cli-progress";
import { formatSize } from "../../bytes/index.js";
import type { CliContext, CommonOptions } from "../context.js";
import type { EmitEvent } from "./output.js";

/** How far a disk is, in bytes. */
export interface DiskProgress {
  readonly disk: string;
  readonly done: number;
  readonly total: number;
}

/** Shows how far each disk is. */
export interface Progress {
  update(progress: DiskProgress): void;
  /** Clears what is shown: call it before anything else is printed. */
  stop(): void;
}

/** Least milliseconds between two progress events of a disk. */
const EVENT_INTERVAL = 250;

/** Progress as the options want it: events, bars on a terminal, or nothing. */
export function progressFor(context: CliContext, options: CommonOptions, emit: EmitEvent): Progress {
  if (options.json === true) return progressEvents(emit);
  const isShown = options.progress !== false && options.quiet !== true && context.stderr.isTTY;
  return isShown ? progressBars(context.stderr) : { update: () => undefined, stop: () => undefined };
}

/** Events, at most four a second for each disk, the first and the last one always. */
function progressEvents(emit: EmitEvent): Progress {
  const last = new Map<string, number>();
  return {
    update(progress) {
      const { disk, done, total } = progress;
      const now = performance.now();
      if (done < total && now - (last.get(disk) ?? -Infinity) < EVENT_INTERVAL) return;
      last.set(disk, now);
      emit({ event: "progress", ...progress });
    },
    stop: () => undefined,
  };
}

/** Bars, one a disk: share, bytes, rate, time left. */
function progressBars(stream: NodeJS.WriteStream): Progress {
  const bars = new MultiBar(
    {
      stream,
      format: "  {disk} [{bar}] {percentage}%  {size}  {rate}/s  {left}",
      barsize: 24,
      hideCursor: true,
      clearOnComplete: true,
      fps: 4,
    },
    Presets.legacy,
  );
  const started = performance.now();
  const shown = new Map<string, SingleBar>();
  return {
    update({ disk, done, total }) {
      const seconds = Math.max((performance.now() - started) / 1000, 0.001);
      const rate = done / seconds;
      const left = done > 0 && done < total ? `${Math.ceil((total - done) / rate)} s left` : "";
      const payload = { disk: disk.padEnd(10), size: formatSize(total), rate: formatSize(rate), left };
      const bar = shown.get(disk) ?? bars.create(1, 0, payload);
      shown.set(disk, bar);
      bar.setTotal(Math.max(total, 1));
      bar.update(total === 0 ? 1 : done, payload);
    },
    stop: () => bars.stop(),
  };
}
