/*
 * One card per task: its answer as it streams, and what it took.
 *
 * In:   a task, the body of a request.
 * Out:  an <article>; `ended` resolves when the answer has ended in any way.
 * Who:  page.js.
 *
 * Text enters through text nodes only. `aria-busy` holds a screen reader back until the answer is whole. The server
 * counts the tokens at the end; until then the pieces are counted and marked with ~.
 */

import { complete } from "./api.js";
import { copy } from "./snippets.js";

const EMPTY = { done: "The answer has no text.", stopped: "Stopped before the first word." };
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

export class Card {
  constructor(task, hue, { onKey, onGone, onRun }) {
    Object.assign(this, { task, onKey, onGone, onRun });
    this.element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    this.element.style.setProperty("--hue", hue);
    this.element.dataset.task = task;
    this.element.querySelector("h3").textContent = task;
    this.element.setAttribute("aria-label", `Answer of ${task}`);
    this.answer = this.element.querySelector(".answer");
    this.answer.setAttribute("aria-label", `Text of ${task}`);
    this.problem = this.element.querySelector(".problem");
    this.part("stop").addEventListener("click", () => this.stop());
    this.part("again").addEventListener("click", () => this.run(this.body));
    this.part("copy").addEventListener("click", () => this.copy());
    for (const name of ["stop", "again", "copy"]) {
      this.part(name).setAttribute("aria-label", `${this.part(name).textContent}: ${task}`);
    }
  }

  part(name) {
    return this.element.querySelector(`[data-is="${name}"]`);
  }

  /** Asks, and shows what comes. Never throws: what goes wrong is shown. */
  run(body) {
    this.body = body;
    this.control = new AbortController();
    this.answer.replaceChildren(document.createTextNode(""));
    this.answer.ariaBusy = "true";
    this.answer.dataset.note = "";
    this.problem.hidden = true;
    this.time = { sent: null, first: null, last: null };
    this.tokens = 0;
    this.counted = false;
    this.finish = "–";
    this.wait(0);
    this.state("queued");
    this.measure();
    this.ended = this.stream().finally(() => {
      this.answer.ariaBusy = "false";
      if (!this.answer.textContent.trim()) this.answer.dataset.note = EMPTY[this.state()] ?? "";
      this.measure();
    });
    this.onRun(this);
  }

  async stream() {
    const { signal } = this.control;
    try {
      const sent = () => {
        this.time.sent = performance.now();
        this.state("waiting");
      };
      for await (const piece of complete({ model: this.task, ...this.body }, signal, sent)) this.take(piece);
      this.state("done");
    } catch (error) {
      if (signal.aborted) {
        this.state("stopped");
        return;
      }
      this.state("error");
      this.fail(error);
    }
  }

  fail({ message, status, after }) {
    this.problem.textContent = message;
    this.problem.hidden = false;
    if (status) this.finish = `HTTP ${status}`;
    if (status === 401) this.onKey();
    if (status === 404) this.onGone();
    this.wait(after);
  }

  /** Counts down the seconds for which the server does not want to be asked. */
  wait(seconds) {
    clearTimeout(this.timer);
    this.part("again").textContent = seconds > 0 ? `Again in ${seconds} s` : "Again";
    if (seconds > 0) this.timer = setTimeout(() => this.wait(seconds - 1), 1000);
  }

  take({ text, finish, usage }) {
    if (text) {
      this.time.last = performance.now();
      this.time.first ??= this.time.last;
      this.tokens += 1;
      if (this.state() === "waiting") this.state("streaming");
      const below = this.answer.scrollHeight - this.answer.scrollTop - this.answer.clientHeight;
      this.answer.firstChild.appendData(text);
      if (below < 8) this.answer.scrollTop = this.answer.scrollHeight; // who scrolled up stays there
    }
    if (finish) this.finish = finish;
    if (Number.isFinite(usage?.completion_tokens)) {
      this.tokens = usage.completion_tokens;
      this.counted = true;
    }
    this.measure();
  }

  measure() {
    const { sent, first, last } = this.time;
    const rate = this.tokens > 1 && last > first ? ((this.tokens - 1) * 1000) / (last - first) : null;
    const sure = this.counted || !this.tokens ? "" : "~";
    this.part("tokens").textContent = `${sure}${this.tokens}`;
    this.part("speed").textContent = rate === null ? "–" : `${sure}${rate.toFixed(rate < 10 ? 1 : 0)}`;
    this.part("first").textContent = first === null ? "–" : seconds(first - sent);
    this.part("finish").textContent = this.finish;
  }

  /** The state, or after setting it: which buttons there are follows from it. */
  state(value) {
    const pill = this.part("state");
    if (value === undefined) return pill.dataset.state;
    const running = ["queued", "waiting", "streaming"].includes(value);
    const held = [this.part("stop"), this.part("again")].includes(document.activeElement);
    pill.textContent = value;
    pill.dataset.state = value;
    this.part("stop").hidden = !running;
    this.part("again").hidden = running;
    if (held) this.part(running ? "stop" : "again").focus(); // a hidden button would lose the keyboard's place
    return value;
  }

  stop() {
    this.control.abort();
  }

  async copy() {
    const button = this.part("copy");
    try {
      await copy(this.answer.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
}
