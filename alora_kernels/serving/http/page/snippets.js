/*
 * The present settings as a program: curl commands or Python with the openai package.
 *
 * In:   tasks and what gives the body of the request to each.
 * Out:  text to paste; the key is named by its environment variable, never written out.
 * Who:  page.js.
 */

const url = (path) => new URL(path, document.baseURI).href;
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const python = (value) => (Array.isArray(value) ? `[${value.map(python).join(", ")}]` : JSON.stringify(value));

/** One curl command per task. */
export function asCurl(tasks, bodyOf, withKey) {
  const auth = withKey ? ` \\\n  -H "Authorization: Bearer $ALORA_API_KEY"` : "";
  const one = (model) =>
    `curl -sS ${shell(url("v1/completions"))} \\\n  -H 'Content-Type: application/json'${auth} \\\n` +
    `  -d ${shell(JSON.stringify({ model, ...bodyOf(model) }))}`;
  return tasks.map(one).join("\n\n") + "\n";
}

/** A loop over the tasks; JSON's strings and numbers are Python's too. */
export function asPython(tasks, bodyOf, withKey) {
  const { apply_template: _, ...body } = bodyOf(tasks[0]);
  const templated = tasks.filter((task) => bodyOf(task).apply_template);
  const extra = templated.length ? `        extra_body={"apply_template": task in ${python(templated)}},\n` : "";
  const settings = Object.entries(body).map(([name, value]) => `        ${name}=${python(value)},\n`).join("");
  const secret = withKey ? `os.environ["ALORA_API_KEY"]` : `"none"`;
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${python(url("v1"))}, api_key=${secret})
for task in ${python(tasks)}:
    answer = client.completions.create(
        model=task,
${settings}${extra}    )
    print(task, answer.choices[0].text, sep=": ")
`;
}

/** Puts text on the clipboard; browsers offer the newer way on HTTPS and localhost only. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser does not allow it");
}
