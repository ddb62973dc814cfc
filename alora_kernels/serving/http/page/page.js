/*
 * The playground: one prompt, several tasks, their answers side by side.
 *
 * In:   the form.
 * Out:  a card per chosen task.
 * Who:  index.html; the other files are its parts: api, snippets, picker, hints, cards, live.
 */

import { getJSON, key } from "./api.js";
import { Card } from "./cards.js";
import { isKnown, showHints } from "./hints.js";
import { Live } from "./live.js";
import { Picker } from "./picker.js";
import { asCurl, asPython, copy } from "./snippets.js";

const at = (id) => document.getElementById(id);
const picker = new Picker({ onChange: () => showHints(picker.chosen(), picker.cards) });
const live = new Live({ onUp: start, onKey: askKey, onTasks: loadModels });
let cards = [];

async function loadModels() {
  try {
    picker.set((await getJSON("v1/models")).data ?? []);
  } catch (error) {
    if (error.status === 401) askKey();
    else {
      say(`The list of tasks did not come: ${error.message}`);
      setTimeout(loadModels, 4000);
    }
  }
}

function start() {
  at("key-form").hidden = true;
  return loadModels();
}

function askKey() {
  if (!at("key-form").hidden && !key.get()) return;
  if (key.get()) at("key-note").textContent = "The server refused this key.";
  key.set("");
  at("key-form").hidden = false;
  at("key").focus();
}

function say(text) {
  at("said").textContent = text;
}

/** The texts at which an answer ends: a line each, with \n, \t and \\ as in a program. */
function stops() {
  const plain = { n: "\n", t: "\t", "\\": "\\" };
  const lines = at("stop").value.split("\n").filter(Boolean);
  return lines.map((line) => line.replace(/\\([nt\\])/g, (_, letter) => plain[letter]));
}

/** The request without its model, or null after saying what is missing. */
function settings() {
  const lines = stops();
  at("stop").setCustomValidity(lines.length > 4 ? "At most four stop texts" : "");
  if (!at("send-form").reportValidity()) return null;
  if (!picker.chosen().length) {
    say("Choose at least one task.");
    return null;
  }
  say("");
  return {
    prompt: at("prompt").value,
    max_tokens: at("max-tokens").valueAsNumber,
    temperature: at("temperature").valueAsNumber,
    ...(lines.length ? { stop: lines } : {}),
  };
}

/** The request to one task, whose own prompt the text is put into if that is known and wanted. */
const asked = (body) => (task) =>
  at("apply").checked && isKnown(picker.cards.get(task)) ? { ...body, apply_template: true } : body;

const busy = () => cards.some((card) => card.answer.ariaBusy === "true");

function buttons() {
  at("send").disabled = busy();
  at("stop-all").disabled = !busy();
}

async function watch(card) {
  buttons();
  await card.ended;
  buttons();
}

function send() {
  const body = busy() ? null : settings();
  if (!body) return;
  at("empty").hidden = true;
  at("asked").hidden = false;
  at("asked").querySelector("p").textContent = body.prompt;
  cards = picker.chosen().map((task) => new Card(task, picker.hueOf(task), { onKey: askKey, onRun: watch }));
  at("cards").replaceChildren(...cards.map((card) => card.element));
  for (const card of cards) card.run(asked(body)(card.task));
  const narrow = matchMedia("(max-width: 860px)").matches;
  if (narrow) at("results").scrollIntoView({ block: "start" });
}

async function copySettings(button, write) {
  const body = settings();
  if (!body) return;
  try {
    await copy(write(picker.chosen(), asked(body), Boolean(key.get())));
    say(`${button.textContent.replace("Copy", "Copied")}.`);
  } catch (error) {
    say(`Not copied: ${error.message}`);
  }
}

at("send-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("send-form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  }
});
at("stop-all").addEventListener("click", () => cards.forEach((card) => card.stop()));
at("copy-curl").addEventListener("click", ({ currentTarget }) => copySettings(currentTarget, asCurl));
at("copy-python").addEventListener("click", ({ currentTarget }) => copySettings(currentTarget, asPython));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value);
  at("key").value = "";
  live.poll();
});
live.poll();
