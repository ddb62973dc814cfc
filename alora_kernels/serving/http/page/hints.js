/*
 * How the chosen tasks were asked in training: a task answers well only such prompts.
 *
 * In:   ids in the order of the list, and what /v1/models says of each: how it was asked, or nothing.
 * Out:  a closed part of the form with a template and label words per task, and a button that fills the prompt.
 * Who:  page.js.
 */

const at = (id) => document.getElementById(id);

function made(tag, text, className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

/** Whether the server can put a text into the task's own prompt. */
export const isKnown = (card) => Boolean(card?.template || card?.chat);

const shown = ({ template, sample, chat, system }) =>
  chat ? `a chat${system ? ` after the system prompt ${JSON.stringify(system)}` : ""}` : template ?? sample;

/** The first {placeholder} of a template is selected, so that typing replaces it. */
function fill({ template, sample }) {
  const prompt = at("prompt");
  prompt.value = sample ?? template;
  prompt.focus();
  const hole = sample ? null : /\{[^{}]+\}/.exec(template);
  if (hole) prompt.setSelectionRange(hole.index, hole.index + hole[0].length);
}

function hint(id, card) {
  const entry = made("div", "", "hint");
  const button = made("button", "Use as prompt", "quiet");
  button.type = "button";
  button.setAttribute("aria-label", `Use as prompt: ${id}`);
  button.addEventListener("click", () => fill(card));
  const head = made("div", "", "row between");
  head.append(made("h3", id), ...(card.chat ? [] : [button]));
  entry.append(head, made("pre", shown(card)));
  if (card.answers.length) entry.append(made("p", `answers: ${card.answers.join(", ")}`, "note"));
  return entry;
}

/** Shows the chosen tasks; those that do not say how they were asked are named, so that nobody looks for them. */
export function showHints(chosen, cards) {
  const known = chosen.filter((id) => isKnown(cards.get(id)) || cards.get(id)?.sample);
  const silent = chosen.filter((id) => cards.has(id) && !known.includes(id));
  at("hints").hidden = !known.length;
  at("hint-list").replaceChildren(...known.map((id) => hint(id, cards.get(id))));
  if (known.length && silent.length) at("hint-list").append(made("p", `Not known of ${silent.join(", ")}.`, "note"));
}
