// The status API. The token lives in this tab's session storage and travels as a header only.

const KEY = "tip-ray-token";
const TIMEOUT_MS = 20000;

/** `status` is the answer's, 0 where none came. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function request(method, path, params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== undefined && value !== null);
  const query = given.length ? `?${new URLSearchParams(given)}` : "";
  const headers = { Authorization: `Bearer ${token.get()}`, Accept: "application/json" };
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  let answer;
  try {
    answer = await fetch(`${path}${query}`, { method, headers, signal, cache: "no-store" });
  } catch {
    throw new ApiError(0, "the server does not answer");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new ApiError(answer.status, body.error ?? `the server says ${answer.status}`);
  return body;
}

const of = (run, rest = "") => `/api/runs/${encodeURIComponent(run)}${rest}`;

export const api = {
  runs: (limit) => request("GET", "/api/runs", { limit }),
  status: (run) => request("GET", of(run)),
  spec: (run) => request("GET", of(run, "/spec")),
  metrics: (run, params) => request("GET", of(run, "/metrics"), params),
  events: (run, params) => request("GET", of(run, "/events"), params),
  samples: (run, step) => request("GET", of(run, "/samples"), { step }),
  cancel: (run) => request("POST", of(run, "/cancel")),
};
