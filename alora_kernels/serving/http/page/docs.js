/*
 * What the server takes: a part per route, a row per field of its body.
 *
 * In:   openapi.json, read with the key that the playground keeps in this tab.
 * Out:  text nodes only.
 * Who:  docs.html.
 */

import { getJSON } from "./api.js";
import { at, made } from "./dom.js";

/** A type in words: "text", "list of Message", "number 0 to 5, or nothing". */
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(kind))].join(" or ");
  if (schema.enum ?? schema.const) return (schema.enum ?? [schema.const]).map((one) => JSON.stringify(one)).join(" or ");
  const limits = [schema.minimum, schema.maximum].filter((one) => one !== undefined).join(" to ");
  const name = schema.type === "array" ? `list of ${kind(schema.items ?? {})}` : schema.type ?? "anything";
  return limits ? `${name} ${limits}` : name;
}

function fields(schema) {
  const table = made("table");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const row = made("tr");
    row.append(made("th", name + (schema.required?.includes(name) ? " *" : "")), made("td", kind(field)));
    table.append(row);
  }
  return table;
}

function part(title, text, schema) {
  const section = made("section");
  section.append(made("h2", title));
  if (text) section.append(made("p", text));
  if (schema) section.append(fields(schema));
  return section;
}

try {
  const { paths, components } = await getJSON("openapi.json");
  const shown = new Set();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const name = kind(route.requestBody?.content["application/json"].schema ?? {});
      shown.add(name);
      const schema = components.schemas[name];
      at("routes").append(part(`${method.toUpperCase()} ${path}`, schema?.description, schema));
    }
  }
  for (const [name, schema] of Object.entries(components.schemas)) {
    if (!shown.has(name)) at("routes").append(part(name, schema.description, schema));
  }
  at("said").textContent = "Fields with * are needed.";
} catch (error) {
  at("said").textContent =
    error.status === 401 ? "This server asks for a key: unlock the playground in this tab, then come back." : error.message;
}
