const two = (value: number): string => String(value).padStart(2, "0");

/** A time for people: local, to the minute. */
export function formatMinute(iso: string): string {
  const time = new Date(iso);
  const date = `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())}`;
  return `${date} ${two(time.getHours())}:${two(time.getMinutes())}`;
}

/** How far local time was from UTC then: "+0100". */
export function formatZone(iso: string): string {
  const minutes = -new Date(iso).getTimezoneOffset();
  const distance = Math.abs(minutes);
  return `${minutes < 0 ? "-" : "+"}${two(Math.floor(distance / 60))}${two(distance % 60)}`;
}

/** A time for people: local, to the second, with its distance from UTC. */
export function formatTime(iso: string): string {
  return `${formatMinute(iso)}:${two(new Date(iso).getSeconds())} ${formatZone(iso)}`;
}
