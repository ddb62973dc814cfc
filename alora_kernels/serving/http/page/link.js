/*
 * The form as a part of the page's address, behind its #: no server, no log and no Referer gets that part.
 *
 * In:   the form and the tasks chosen, or an address.
 * Out:  `write` puts them into the address, `read` fills the form. The API key is no field of this form.
 * Who:  page.js.
 *
 * A prompt that would make the address longer than LONGEST stays out; a reload in this tab still finds it.
 */

import { at } from "./dom.js";

const LONGEST = 4000; // characters that mail and chat programs leave whole
const FIELDS = { prompt: "prompt", max_tokens: "max-tokens", temperature: "temperature", stop: "stop" };
const NAMES = ["task", "raw", "left_out", ...Object.keys(FIELDS)];

export function write(tasks) {
  const state = new URLSearchParams((tasks.length ? tasks : [""]).map((task) => ["task", task]));
  for (const [name, id] of Object.entries(FIELDS)) {
    if (at(id).value !== at(id).defaultValue) state.set(name, at(id).value);
  }
  if (!at("apply").checked) state.set("raw", "1");
  const prompt = at("prompt").value;
  if (String(state).length > LONGEST) {
    state.delete("prompt");
    state.set("left_out", prompt.length);
  }
  history.replaceState({ prompt }, "", `#${state}`);
}

/** Fills the form from the address; the tasks it names (null: none are named), and what is wrong with it. */
export function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const said = [...given.keys()].filter((name) => !NAMES.includes(name)).map((name) => `The link's ${name} is not known.`);
  if (!given.size) return { tasks: null, said };
  for (const [name, id] of Object.entries(FIELDS)) {
    at(id).value = given.get(name) ?? at(id).defaultValue;
    if (given.get(name) && !at(id).value) said.push(`The link's ${name} is no number.`);
  }
  at("apply").checked = !given.has("raw");
  if (given.has("left_out")) {
    at("prompt").value = history.state?.prompt ?? "";
    if (!at("prompt").value) said.push(`The link leaves out its prompt of ${given.get("left_out")} characters: paste it.`);
  }
  return { tasks: given.has("task") ? given.getAll("task").filter(Boolean) : null, said };
}
