/*
 * How the chosen tasks were asked in training: a task answers well only such prompts.
 *
 * In:   ids in the order of the list, and what /v1/models says of each: how it was asked, or nothing.
 * Out:  a button per task that chooses it and fills the prompt; a closed part of the form with the template and label
 *       words of each chosen task, and a button that fills the prompt only.
 * Who:  page.js.
 */

import { at, made } from "./dom.js";

/** Whether the server can put a text into the task's own prompt. */
export const isKnown = (card) => Boolean(card?.template || card?.chat);

const isAsked = (card) => isKnown(card) || Boolean(card?.sample);

const shown = ({ template, sample, chat, system }) =>
  chat ? `a chat${system ? ` after the system prompt ${JSON.stringify(system)}` : ""}` : template ?? sample;

/** A sample can be sent; of a template the first {placeholder} is selected, so that typing replaces it. */
function fill({ template, sample, chat }) {
  const prompt = at("prompt");
  prompt.value = sample ?? (chat ? "" : template);
  prompt.dispatchEvent(new Event("input", { bubbles: true }));
  at(sample ? "send" : "prompt").focus();
  const hole = /\{[^{}]+\}/.exec(sample ? "" : prompt.value);
  if (hole) prompt.setSelectionRange(hole.index, hole.index + hole[0].length);
}

/** A button per task that says how it was asked: it alone is chosen, and asked as in its training. */
export function showPresets(ids, cards, choose) {
  const known = ids.filter((id) => isAsked(cards.get(id)));
  at("presets").hidden = !known.length;
  at("preset-list").replaceChildren(...known.map((id) => {
    const button = Object.assign(made("button", id, "quiet"), { type: "button", ariaLabel: `Preset: ${id}` });
    button.addEventListener("click", () => {
      const card = cards.get(id);
      choose(id);
      at("apply").checked = !(card.chat && card.sample); // such a sample is a whole chat already
      fill(card);
    });
    return button;
  }));
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
  const known = chosen.filter((id) => isAsked(cards.get(id)));
  const silent = chosen.filter((id) => cards.has(id) && !known.includes(id));
  at("hints").hidden = !known.length;
  at("hint-list").replaceChildren(...known.map((id) => hint(id, cards.get(id))));
  if (known.length && silent.length) at("hint-list").append(made("p", `Not known of ${silent.join(", ")}.`, "note"));
}
