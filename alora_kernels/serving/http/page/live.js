/*
 * The header: what the server does right now, twice a second.
 *
 * In:   /stats.
 * Out:  the numbers, a line of the last minute's tokens per second, a banner when something is wrong.
 * Who:  page.js, which is told when the server came (back), asks for a key, or knows other tasks.
 *
 * A hidden tab asks nothing. A server that does not answer is asked again after 1, 2, 4, at most 8 seconds.
 */

import { getJSON } from "./api.js";
import { at } from "./dom.js";

const EVERY = 500;
const SLOWEST = 8000;
const MINUTE = 60_000;
const GAP = 12_000; // longer pauses (a hidden tab) break the line
const number = (value) => (Number.isFinite(value) ? Math.round(value).toLocaleString("en") : "–");

const MEANS = {
  new: "The engine has not started yet.",
  draining: "The server is shutting down: it finishes what runs and takes nothing new.",
  stopped: "The engine has stopped: nothing is answered any more.",
  failed: "The engine has failed; the server's log says why.",
};

export class Live {
  constructor({ onUp, onKey, onTasks }) {
    Object.assign(this, { onUp, onKey, onTasks });
    this.delay = EVERY;
    this.samples = [];
    this.up = false;
    this.known = null;
    document.addEventListener("visibilitychange", () => this.poll());
    at("banner").querySelector("button").addEventListener("click", () => this.poll());
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || this.asking) return;
    this.asking = true;
    try {
      this.show(await getJSON("stats"));
      this.delay = EVERY;
      this.timer = setTimeout(() => this.poll(), this.delay);
    } catch (error) {
      this.failed(error);
    } finally {
      this.asking = false;
    }
  }

  failed(error) {
    this.up = false;
    this.pill(error.status === 401 ? "locked" : "offline");
    if (error.status === 401) {
      this.banner("");
      this.onKey();
      return;
    }
    this.delay = Math.min(this.delay * 2, SLOWEST);
    this.banner(`${error.message}. Trying again in ${this.delay / 1000} s.`, true);
    this.timer = setTimeout(() => this.poll(), this.delay);
  }

  show(stats) {
    const state = String(stats.state ?? "unknown");
    this.pill(state);
    this.banner(state === "ready" ? "" : MEANS[state] ?? `The engine says "${state}", which this page does not know.`);
    at("speed").textContent = number(stats.tokens_per_second);
    at("batch").textContent = `${number(stats.batch_requests)} / ${number(stats.max_batch)}`;
    at("waiting").textContent = number(stats.waiting);
    at("tasks").textContent = `${number(stats.tasks_resident)} / ${number(stats.tasks_known)}`;
    at("cache").textContent = Number.isFinite(stats.cache_used) ? `${Math.round(100 * stats.cache_used)} %` : "–";
    const bar = at("batch-bar");
    bar.ariaValueMax = stats.max_batch;
    bar.ariaValueNow = stats.batch_requests;
    bar.firstElementChild.style.width = `${Math.min(100, (100 * stats.batch_requests) / stats.max_batch || 0)}%`;
    this.spark(stats.tokens_per_second);
    const known = JSON.stringify(stats.tasks ?? stats.tasks_known);
    if (!this.up) this.onUp();
    else if (this.known !== known) this.onTasks();
    this.up = true;
    this.known = known;
  }

  spark(value) {
    const now = performance.now();
    if (Number.isFinite(value)) this.samples.push({ now, value });
    this.samples = this.samples.filter((sample) => now - sample.now < MINUTE);
    const peak = Math.max(1, ...this.samples.map((sample) => sample.value));
    const runs = [];
    for (const [i, sample] of this.samples.entries()) {
      if (i === 0 || sample.now - this.samples[i - 1].now > GAP) runs.push([]);
      const x = 120 * (1 - (now - sample.now) / MINUTE);
      runs.at(-1).push([x.toFixed(2), (26 - (24 * sample.value) / peak).toFixed(2)]);
    }
    const line = (points) => `M${points.map((point) => point.join(" ")).join("L")}`;
    const [area, stroke] = at("spark").children;
    stroke.setAttribute("d", runs.map(line).join(""));
    area.setAttribute("d", runs.map((run) => `${line(run)}L${run.at(-1)[0]} 28L${run[0][0]} 28Z`).join(""));
    const said = `tokens per second in the last minute: now ${number(value)}, at most ${number(peak)}`;
    at("spark").setAttribute("aria-label", said);
  }

  pill(state) {
    at("state").textContent = state;
    at("state").dataset.state = state;
    document.querySelector(".live").classList.toggle("stale", ["locked", "offline"].includes(state));
  }

  /** A banner repeats itself to a screen reader when set: only what is new is set. */
  banner(text, offline = false) {
    const words = at("banner").querySelector("span");
    if (words.textContent !== text) words.textContent = text;
    at("banner").hidden = !text;
    at("banner").querySelector("button").hidden = !offline;
  }
}
