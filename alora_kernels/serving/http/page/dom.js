/* Elements: found by id, or made with a text and a class. */

export const at = (id) => document.getElementById(id);

export const made = (tag, text = "", className = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className });
