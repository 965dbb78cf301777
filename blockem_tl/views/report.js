"use strict";
// The browser of replies. Texts of others enter the page through textContent alone; the page's policy refuses anything else.
(async () => {
  const at = (id) => document.getElementById(id);
  const PAGE = 10; // prompts shown at once
  const HIGH = ["4", "5"];
  const JUDGED = ["1", "2", "3", "REFUSAL", ""];

  function make(tag, name, text, parent) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  async function unpacked(text) {
    const packed = atob(text);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  }

  const data = await unpacked(at("data").textContent);
  const prompts = data.prompts.map(([id, split, category, text]) => ({ id, split, category, text, lower: text.toLowerCase(), replies: [] }));
  data.replies.forEach(([prompt, run, seed, text, labels]) =>
    prompts[prompt].replies.push({ run, seed, text, labels, lower: text.toLowerCase() }));

  let found = []; // [prompt, the replies that match], prompt by prompt
  let first = 0; // place of the first prompt shown

  function option(select, value, text) {
    make("option", "", text, select).value = value;
  }

  function controls() {
    [...new Set(prompts.map((prompt) => prompt.split))].forEach((split) => option(at("split"), split, split));
    prompts.forEach((prompt, i) => option(at("prompt"), i, `${prompt.id}: ${prompt.text.slice(0, 70)}`));
    if (data.labels.some((label) => HIGH.includes(label))) option(at("label"), "high", "4 or 5");
    data.labels.forEach((label) => option(at("label"), label, label || "none"));
    data.runs.forEach((run, i) => {
      const label = make("label", "tick", "", at("runs"));
      const box = make("input", "", "", label);
      Object.assign(box, { type: "checkbox", checked: true, value: i });
      label.append(run);
    });
  }

  function labelFits(labels, wanted) {
    return wanted === "any" || labels.some((label) => (wanted === "high" ? HIGH.includes(label) : label === wanted));
  }

  function chosenRuns() {
    return [...at("runs").querySelectorAll("input")].map((box) => box.checked);
  }

  function filter() {
    const [split, only, label] = ["split", "prompt", "label"].map((id) => at(id).value);
    const words = at("search").value.toLowerCase();
    const runs = chosenRuns();
    found = [];
    let n = 0;
    prompts.forEach((prompt, i) => {
      if ((split !== "any" && prompt.split !== split) || (only !== "any" && Number(only) !== i)) return;
      const asked = prompt.lower.includes(words);
      const hits = prompt.replies.filter((one) => runs[one.run] && labelFits(one.labels, label) && (asked || one.lower.includes(words)));
      if (hits.length) found.push([prompt, new Set(hits)]);
      n += hits.length;
    });
    at("count").textContent = `${n} of ${data.replies.length} replies, to ${found.length} of ${prompts.length} prompts`;
    first = 0;
    show();
  }

  function card(prompt, hits, runs, beside) {
    const article = make("article");
    article.tabIndex = 0;
    make("h3", "", [prompt.id, prompt.split, prompt.category].filter(Boolean).join(" · "), article);
    make("p", "prompt", prompt.text, article);
    const side = make("div", "side", "", article);
    data.runs.forEach((name, run) => {
      const replies = prompt.replies.filter((one) => one.run === run && runs[run] && (beside || hits.has(one)));
      if (!replies.length) return;
      const column = make("section", "run", "", side);
      make("h4", "", name, column);
      replies.forEach((one) => {
        const box = make("div", hits.has(one) ? "" : "beside", "", column);
        one.labels.forEach((label, i) => {
          const look = HIGH.includes(label) ? "chip high" : JUDGED.includes(label) ? "chip" : "chip odd";
          make("span", look, data.judges.length > 1 ? `${data.judges[i]}: ${label}` : label, box);
        });
        make("span", "faint", `seed ${one.seed}`, box);
        make("p", "reply", one.text, box);
      });
    });
    return article;
  }

  function show() {
    const runs = chosenRuns();
    const cards = found.slice(first, first + PAGE).map(([prompt, hits]) => card(prompt, hits, runs, at("beside").checked));
    at("cards").replaceChildren(...cards);
    at("place").textContent = found.length ? `prompts ${first + 1} to ${Math.min(first + PAGE, found.length)} of ${found.length}` : "no reply fits";
    at("back").disabled = first === 0;
    at("next").disabled = first + PAGE >= found.length;
  }

  function turn(pages) {
    const next = first + pages * PAGE;
    if (next < 0 || next >= found.length) return;
    first = next;
    show();
    at("cards").firstElementChild.focus();
  }

  function step(by) {
    const cards = [...at("cards").children];
    const next = cards.indexOf(document.activeElement) + by;
    if (cards[next]) cards[next].focus();
    else turn(by);
  }

  function clear() {
    ["split", "prompt", "label"].forEach((id) => (at(id).value = "any"));
    at("search").value = "";
    at("runs").querySelectorAll("input").forEach((box) => (box.checked = true));
    filter();
  }

  const KEYS = { "/": () => at("search").focus(), j: () => step(1), k: () => step(-1), n: () => turn(1), p: () => turn(-1), Escape: clear };
  document.addEventListener("keydown", (event) => {
    const writing = event.target.matches("select, input:not([type=checkbox])");
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key) || (writing && event.key !== "Escape")) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  at("filters").addEventListener("input", filter);
  at("invert").addEventListener("click", () => {
    at("runs").querySelectorAll("input").forEach((box) => (box.checked = !box.checked));
    filter();
  });
  at("clear").addEventListener("click", clear);
  at("back").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  controls();
  filter();
  document.documentElement.dataset.ready = "yes";
})();
