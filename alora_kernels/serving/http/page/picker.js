/*
 * Which tasks answer: a list of checkboxes with a search.
 *
 * In:   entries of /v1/models, the base model first.
 * Out:  `chosen()`: ids in the order of the list; `shown`: those with a checkbox; `cards`: id of a task -> how it was
 *       asked, or null. `onChange` after every change of any.
 * Who:  page.js.
 *
 * At most LIMIT tasks at once (each is a card), and at most SHOWN checkboxes: thousands of tasks stay usable, the search
 * finds the rest. Chosen tasks stay in view whatever the search says.
 */

import { at, made } from "./dom.js";

export const LIMIT = 24;
const SHOWN = 200;
const SEARCH_FROM = 10;

export const hue = (index) => (index * 137) % 360; // the golden angle: neighbours differ

export class Picker {
  constructor({ onChange }) {
    this.onChange = onChange;
    this.models = [];
    this.shown = [];
    this.cards = new Map();
    this.selected = new Set();
    this.list = at("choices");
    at("search").addEventListener("input", () => this.draw());
    at("all").addEventListener("click", () => this.selectShown());
    at("none").addEventListener("click", () => this.select([]));
    this.list.addEventListener("change", ({ target }) => {
      if (target.checked) this.selected.add(target.value);
      else this.selected.delete(target.value);
      this.count();
    });
    at("search").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) event.preventDefault(); // it would send
    });
  }

  /** Takes the list of /v1/models; the first tasks are chosen when nothing was before. */
  set(entries) {
    const ids = (wanted) => entries.filter((entry) => Boolean(entry.parent) === wanted).map((entry) => entry.id);
    const [base, tasks] = [ids(false), ids(true)];
    const models = [...base, ...tasks];
    this.cards = new Map(entries.filter((entry) => entry.parent).map((entry) => [entry.id, entry.prompt ?? null]));
    if (models.join("\n") === this.models.join("\n")) return this.onChange();
    const first = this.models.length === 0;
    this.models = models;
    this.base = new Set(base);
    this.selected = new Set([...this.selected].filter((id) => models.includes(id)));
    if (first && !this.selected.size) (tasks.length ? tasks : base).slice(0, 3).forEach((id) => this.selected.add(id));
    at("search").hidden = models.length < SEARCH_FROM;
    this.draw();
  }

  chosen() {
    return this.models.filter((id) => this.selected.has(id));
  }

  /** Chooses these alone; returns those that cannot be: the server does not know them, or they are too many. */
  select(ids) {
    this.selected = new Set(ids.filter((id) => this.models.includes(id)).slice(0, LIMIT));
    this.draw();
    return ids.filter((id) => !this.selected.has(id));
  }

  hueOf(id) {
    return hue(this.models.indexOf(id));
  }

  matches() {
    const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    return this.models.filter((id) => words.every((word) => id.toLowerCase().includes(word)));
  }

  selectShown() {
    for (const id of this.matches()) if (this.selected.size < LIMIT) this.selected.add(id);
    this.draw();
  }

  draw() {
    const found = new Set(this.matches());
    const wanted = this.models.filter((id) => found.has(id) || this.selected.has(id));
    this.shown = wanted.filter((id, index) => index < SHOWN || this.selected.has(id));
    this.list.replaceChildren(...this.shown.map((id) => this.choice(id)));
    const note = made("p", "", "note");
    if (!found.size) note.textContent = this.models.length ? "No task has this in its name." : "The server knows no task.";
    else if (this.shown.length < wanted.length) {
      note.textContent = `… and ${wanted.length - this.shown.length} more: search.`;
    }
    if (note.textContent) this.list.append(note);
    this.count();
  }

  choice(id) {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: id });
    box.checked = this.selected.has(id);
    const label = made("label", "", "choice");
    label.style.setProperty("--hue", this.hueOf(id));
    label.append(box, made("span", id));
    if (this.base.has(id)) label.append(made("small", "base"));
    return label;
  }

  /** Says how many are chosen; at the limit the others cannot be. */
  count() {
    const full = this.selected.size >= LIMIT;
    for (const box of this.list.querySelectorAll("input")) box.disabled = full && !box.checked;
    at("chosen").textContent = `${this.selected.size} of ${this.models.length} chosen${full ? " (the most)" : ""}`;
    this.onChange();
  }
}
