/*
 * The playground: one prompt, several tasks, their answers side by side.
 *
 * In:   the form.
 * Out:  a card per chosen task.
 * Who:  index.html; the other files are its parts: api, snippets, picker, hints, cards, link, live.
 */

import { getJSON, key } from "./api.js";
import { Card } from "./cards.js";
import { at } from "./dom.js";
import { isKnown, showHints, showPresets } from "./hints.js";
import { read, write } from "./link.js";
import { Live } from "./live.js";
import { LIMIT, Picker } from "./picker.js";
import { asCurl, asPython, copy } from "./snippets.js";

const picker = new Picker({ onChange: changed });
const live = new Live({ onUp: start, onKey: askKey, onTasks: loadModels });
let cards = [];
let link = read();
let timer;

function changed() {
  showHints(picker.chosen(), picker.cards);
  showPresets(picker.shown, picker.cards, (id) => picker.select([id]));
  remember();
}

/** Soon the address says what the form says; browsers refuse to change it often. */
function remember() {
  const [tokens, temperature] = [at("max-tokens").value, at("temperature").value];
  at("more-said").textContent = `${tokens} tokens, temperature ${temperature}${at("apply").checked ? "" : ", prompt as it is"}`;
  clearTimeout(timer);
  timer = setTimeout(() => picker.models.length && write(picker.chosen()), 300);
}

/** Chooses the tasks of the link this page was opened with, once they are known, and says what is wrong with it. */
function follow() {
  if (!link) return;
  const left = link.tasks ? picker.select(link.tasks) : [];
  const lost = left.length ? [`Of the link's tasks not served here, or more than ${LIMIT}: ${left.join(", ")}.`] : [];
  say([...link.said, ...lost].join(" "));
  link = null;
}

async function loadModels() {
  try {
    picker.set((await getJSON("v1/models")).data ?? []);
    follow();
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
  if (at("more").querySelector(":invalid")) at("more").open = true; // what is folded away cannot be pointed at
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

/** Only one of the two can be pressed; the keyboard's place goes to that one. */
function buttons() {
  const [now, other] = busy() ? ["stop-all", "send"] : ["send", "stop-all"];
  const held = document.activeElement === at(other);
  at(now).disabled = false;
  if (held) at(now).focus();
  at(other).disabled = true;
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
  cards = picker.chosen().map((task) => new Card(task, picker.hueOf(task), { onKey: askKey, onGone: loadModels, onRun: watch }));
  at("cards").replaceChildren(...cards.map((card) => card.element));
  for (const card of cards) card.run(asked(body)(card.task));
  at("cards").firstElementChild.scrollIntoView({ block: "nearest" });
}

const stopAll = () => cards.forEach((card) => card.stop());

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
at("send-form").addEventListener("input", remember);
at("stop-all").addEventListener("click", stopAll);
document.addEventListener("keydown", ({ key: pressed }) => pressed === "Escape" && stopAll());
at("copy-curl").addEventListener("click", ({ currentTarget }) => copySettings(currentTarget, asCurl));
at("copy-python").addEventListener("click", ({ currentTarget }) => copySettings(currentTarget, asPython));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value);
  at("key").value = "";
  live.poll();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address holds the state
  at("prompt").focus();
});
addEventListener("hashchange", () => {
  link = read();
  if (picker.models.length) follow();
});
at("more").open = !matchMedia("(max-width: 860px)").matches;
remember();
live.poll();
