/*
 * Talks to the server this page came from.
 *
 * In:   a path relative to the page, so that it also works behind a proxy with a prefix.
 * Out:  JSON, or the events of a stream; `ApiError` with the server's own words.
 * Who:  page.js, live.js, cards.js.
 *
 * A browser opens six HTTP/1.1 connections to one server. Five may stream, so one is always left for /stats; more
 * answers than that wait in the page.
 */

const KEY = "alora.key";
const STREAMS = 5;

export class ApiError extends Error {
  constructor(message, status, after = 0) {
    super(message);
    this.status = status; // 0: no answer at all, or one that broke off
    this.after = after; // seconds the server asks to wait
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function messageOf(response) {
  try {
    const { error } = JSON.parse(await response.text());
    if (error?.message) return error.message;
  } catch {
    // a proxy's page or nothing at all: the status has to do
  }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

/** The response to a GET, or to a POST of `body`; anything but 2xx throws. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, cache: "no-store", body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const late = error.name === "TimeoutError";
    throw new ApiError(late ? "The server does not answer" : "The server cannot be reached", 0);
  }
  if (!response.ok) {
    const after = Number(response.headers.get("Retry-After")) || 0; // a date, which proxies may send, is not counted down
    throw new ApiError(await messageOf(response), response.status, after);
  }
  return response;
}

export async function getJSON(path) {
  const response = await request(path, { signal: AbortSignal.timeout(5000) });
  try {
    return await response.json();
  } catch {
    throw new ApiError("The server's answer is not JSON", response.status);
  }
}

/** The events of a stream, parsed; ends at [DONE] or where the connection ends. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest = (rest + (value ?? "")).replaceAll("\r\n", "\n");
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let free = STREAMS;
const queue = [];

async function enter(signal) {
  signal.throwIfAborted();
  if (free > 0) {
    free -= 1;
    return;
  }
  await new Promise((resolve, reject) => {
    queue.push(resolve);
    signal.addEventListener("abort", () => {
      const at = queue.indexOf(resolve);
      if (at < 0) return;
      queue.splice(at, 1);
      reject(signal.reason);
    }, { once: true });
  });
}

function leave() {
  const next = queue.shift();
  if (next) next();
  else free += 1;
}

/**
 * Streams one completion. `onSent` is called when a connection is free; yields {text, finish, usage}.
 * A stream that breaks off, or that carries an error, throws ApiError.
 */
export async function* complete(body, signal, onSent) {
  await enter(signal);
  try {
    onSent();
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await request("v1/completions", { body: streamed, signal });
    let ended = false;
    for await (const event of events(response)) {
      if (event.error) throw new ApiError(event.error.message ?? "The server gave up on this answer", 0);
      const choice = event.choices?.[0];
      if (choice?.finish_reason) ended = true;
      yield { text: choice?.text ?? "", finish: choice?.finish_reason ?? null, usage: event.usage ?? null };
    }
    if (!ended) throw new ApiError("The connection ended before the answer did", 0);
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(error instanceof SyntaxError ? "The stream is not JSON" : "The connection broke off", 0);
  } finally {
    leave();
  }
}
