// Numbers as people read them; the same words as the report and the command line.

const NONE = "–";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** `71.9%`. */
export function percent(fraction) {
  return isNumber(fraction) ? `${(100 * fraction).toFixed(1)}%` : NONE;
}

/** Four digits that matter: `0.03094`, `1.203`, `12,685`. */
export function number(value) {
  if (!isNumber(value)) return NONE;
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return count(value);
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** Of one token: `71.9%`, `0.012%`, `3e-9`; small ones keep two digits. */
export function probability(value) {
  if (!isNumber(value) || value >= 0.01 || value === 0) return percent(value);
  return value >= 1e-7 ? `${Number((100 * value).toPrecision(2))}%` : value.toExponential(0);
}

/** `12,685`. */
export function count(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en-US") : NONE;
}

/** Bytes with a binary unit: `1.4 MiB`. */
export function bytes(value) {
  if (!isNumber(value)) return NONE;
  let rest = value;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(rest) < 1024) return `${rest.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    rest /= 1024;
  }
  return `${rest.toFixed(1)} TiB`;
}

/** `4.2 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`. */
export function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** The largest unit alone: `3 min`, `2 h`. */
export function age(seconds) {
  if (!isNumber(seconds)) return NONE;
  const s = Math.max(0, seconds);
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

/** Seconds since 1970 as local day and time: `Nov 24, 15:13:38`. */
export function moment(time) {
  if (!isNumber(time)) return NONE;
  const date = new Date(1000 * time);
  const day = date.toLocaleDateString("en-US", { month: "short", day: "numeric" });
  return `${day}, ${date.toLocaleTimeString("en-GB")}`;
}

/** The share of the bytes that did not travel, or null before the first step. */
export function saved(status) {
  return status.bytes_unpruned ? 1 - status.bytes_shipped / status.bytes_unpruned : null;
}

/** A value of a spec. */
export function plain(value) {
  if (value === null || value === undefined) return NONE;
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
