// Shows the step under the cursor. Values reach the page as text only: nothing here parses HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const byId = (id) => document.getElementById(id);
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  const percent = (value) => value === null ? "–" : value > 0 && value < 0.005 ? "<1%" : `${Math.round(100 * value)}%`;
  const milliseconds = (seconds) => `${(1000 * seconds).toFixed(1)} ms`;
  const quoted = (text) => `“${visible(text)}”`;
  const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");

  function element(tag, { name = "", text = null, children = [], attributes = {} } = {}) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function definitions(list, rows) {
    list.replaceChildren(...rows.map(([term, ...values]) => element("div", {
      children: [element("dt", { text: term }), ...values.map((value) => element("dd", { text: value, attributes: { title: value } }))],
    })));
  }

  // A line end stays a line end, after a mark that can be seen but not copied.
  function tokenElement(token, breaks) {
    const span = element("span", { name: `token ${token.source}` });
    for (const part of token.text.split(/(\n|\t|\r)/)) {
      if (/^[\n\t\r]$/.test(part)) {
        span.append(element("span", { name: "mark", text: visible(part), attributes: { "aria-hidden": "true" } }));
        if (breaks && part !== "\r") span.append(part);
      } else if (part) span.append(part);
    }
    return span;
  }

  // ---- the whole run ------------------------------------------------------------------------------------------
  const { totals, sameText, facts, steps } = data;
  const kept = (step) => step.tokens.length - 1;
  if (!data.steps.some((step) => step.memoryNodes)) byId("memory-key").remove();
  byId("title").append(facts.target, element("small", { text: facts.head ? `with ${facts.head}` : "with prompt lookup" }));

  function whyParted() {
    const written = (text) => text === null ? "nothing more" : quoted(text);
    const place = `they differ from token ${sameText.position + 1}: plain wrote ${written(sameText.plain)}, with trees ${written(sameText.own)}`;
    if (sameText.gap === undefined) return place;
    const gap = `logit gap ${sameText.gap.toPrecision(3)}, spacing of ${sameText.dtype} ${sameText.spacing.toPrecision(3)}`;
    return `${place}; ${gap}: ${sameText.explained ? "a near-tie, explained by rounding" : "not explained by rounding"}`;
  }

  const ratio = totals.plainRate ? totals.rate / totals.plainRate : 0;
  const time = totals.draft + totals.verify + totals.rest || 1;
  definitions(byId("figures"), [
    ["tau, tokens per forward", totals.tau.toFixed(2), `${plural(totals.emitted, "token")} in ${plural(totals.forwards, "forward")} of the target`],
    ["tokens per second", totals.rate.toFixed(1), `${ratio.toFixed(2)} times plain decoding, ${totals.plainRate.toFixed(1)}`],
    ["time spent verifying", percent(totals.verify / time), `drafting ${percent(totals.draft / time)}, the rest ${percent(totals.rest / time)}`],
    ["same text as plain", sameText.same ? "yes" : "no", sameText.same ? `all ${plural(totals.emitted, "token")} are equal` : whyParted()],
  ]);
  definitions(byId("facts"), Object.entries(facts));
  byId("prompt").textContent = data.prompt;
  byId("prompt-title").textContent = `Prompt, ${plural(data.promptTokens, "token")}`;

  const answer = byId("answer");
  const bars = byId("bars");
  const most = Math.max(...steps.map((step) => step.tokens.length));
  const whole = steps.map((step) => step.tokens.map((token) => token.text).join("")).join("");
  if (/^(```| {4}|\t)/m.test(whole)) answer.classList.add("mono");

  const summary = (step, index) => {
    const accepted = step.tokens.slice(0, -1).map((token) => token.text).join("");
    const bonus = step.tokens.at(-1)?.text ?? "";
    return `Step ${index}: ${accepted ? `accepted ${quoted(accepted)}, then ` : ""}bonus token ${quoted(bonus)}`;
  };
  steps.forEach((step, index) => {
    answer.append(element("span", {
      children: step.tokens.map((token) => tokenElement(token, true)),
      attributes: { role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": summary(step, index), "data-step": index },
    }));
    const column = element("span", {
      children: step.tokens.map((token) => element("i", { name: token.source })).reverse(),
      attributes: { "data-step": index },
    });
    for (const part of column.children) part.style.height = `${100 / most}%`;
    bars.append(column);
  });
  const options = [...answer.children];

  // ---- one step ------------------------------------------------------------------------------------------------
  function showTimes(step) {
    const parts = [["draft", "drafting"], ["verify", "verifying"], ["rest", "the rest"]];
    const sum = parts.reduce((total, [key]) => total + step.seconds[key], 0);
    const bar = element("div", { name: "bar", attributes: { "aria-hidden": "true" } });
    const list = element("ul");
    for (const [key, label] of parts) {
      const part = element("i", { name: key });
      part.style.flex = `${step.seconds[key] / (sum || 1)} 0 0`;
      bar.append(part);
      const swatch = element("i", { name: key });
      list.append(element("li", { children: [swatch, label, element("b", { text: milliseconds(step.seconds[key]) })] }));
    }
    list.append(element("li", { children: ["in all", element("b", { text: milliseconds(sum) })] }));
    byId("times").replaceChildren(bar, list);
  }

  function showDecision(step) {
    const dash = "–";
    const { seen, chosen } = step;
    const prefix_accept_probs = seen?.prefix_accept_probs.slice(0, 3).map(percent).join(" ") || "no match";
    definitions(byId("seen"), [
      ["context", seen ? plural(seen.context, "token") : dash],
      ["decision", seen ? `${seen.decision}` : dash],
      ["room", seen ? plural(seen.room, "token") : dash],
      ["lookup", seen ? prefix_accept_probs : dash],
    ]);
    const cut = step.cut ? `, cut to ${step.cut.name}` : "";
    definitions(byId("decided"), [
      ["shape", chosen ? `${chosen.name}${cut}` : "prefill"],
      ["levels", chosen ? `${step.levels} of ${chosen.depth}` : dash],
      ["scored", chosen ? plural(step.drafted, "node") : dash],
      ["verified", plural(step.verified, "node")],
    ]);
  }

  function chip(text) {
    return element("span", { name: "chip", text: visible(text) || "·", attributes: { title: quoted(text) } });
  }

  function treeNode(nodes, index, children, bonus) {
    const node = nodes[index];
    const fate = index === 0 ? "root" : node.accepted ? "accepted" : "rejected";
    const row = element("div", { name: "node", children: [chip(node.text)] });
    if (index === 0) row.append(element("span", { name: "note", text: "root, the newest token" }));
    else {
      const fill = element("i");
      fill.style.width = `${100 * Math.min(node.probability ?? 0, 1)}%`;
      const source = { head: "from the head", lookup: "looked up", memory: "remembered", both: "from several sources" }[node.source];
      row.append(
        element("span", { name: "unseen", text: ` ${fate}, ${source}, ` }),
        element("span", { name: "meter", children: [fill], attributes: { "aria-hidden": "true" } }),
        element("span", { name: "number", text: percent(node.probability) }),
        element("span", { name: "number", text: percent(node.path) }),
      );
    }
    const below = children[index].map((child) => treeNode(nodes, child, children, bonus));
    if (bonus.after === index) {
      const last = element("div", { name: "node", children: [chip(bonus.text), element("span", { name: "note", text: "bonus token, picked by the target" })] });
      below.unshift(element("li", { name: "bonus", children: [last] }));
    }
    const item = element("li", { name: `${fate} ${node.source}`, children: [row] });
    if (below.length) item.append(element("ul", { children: below }));
    return item;
  }

  function showTree(step) {
    const tree = byId("tree");
    const key = byId("tree-key");
    if (!step.nodes) {
      key.textContent = "The target read the prompt and picked the first token.";
      tree.replaceChildren();
      return;
    }
    const nodes = step.nodes;
    const children = nodes.map(() => []);
    nodes.forEach((node, index) => index && children[node.parent].push(index));
    for (const list of children) list.sort((a, b) => nodes[b].accepted - nodes[a].accepted || (nodes[b].path ?? 0) - (nodes[a].path ?? 0));
    const after = nodes.reduce((last, node, index) => node.accepted && node.depth >= nodes[last].depth ? index : last, 0);
    const bonus = { after, text: step.tokens.at(-1)?.text ?? "" };
    const deepest = Math.max(...nodes.map((node) => node.depth)) + 1;
    tree.style.setProperty("--indent", `${Math.max(8, Math.min(20, 130 / deepest))}px`);
    const sources = [step.headNodes && `${step.headNodes} from the head`, step.lookupNodes && `${step.lookupNodes} looked up (dashed)`, step.memoryNodes && `${step.memoryNodes} remembered (dotted)`];
    key.textContent = nodes.length === 1 ? "Nothing drafted: a plain step." : `${sources.filter(Boolean).join(", ")}; ${kept(step)} accepted.`;
    const titles = element("div", { name: "node titles", children: [element("span", { text: "alone" }), element("span", { text: "path" })] });
    tree.replaceChildren(...(nodes.length > 1 ? [titles] : []), element("ul", { children: [treeNode(nodes, 0, children, bonus)] }));
  }

  let selected = 0;
  let shown = -1;
  function show(index) {
    if (index === shown) return;
    for (const list of [options, bars.children]) {
      list[shown]?.classList.remove("current");
      list[index].classList.add("current");
    }
    shown = index;
    const step = steps[index];
    const count = kept(step);
    const did = index === 0 ? "prefill" : count > 0 ? `${count} accepted` : step.verified > 1 ? "none accepted" : "plain";
    byId("step-title").textContent = `Step ${index} of ${steps.length - 1}: ${did}`;
    byId("step-text").replaceChildren(...step.tokens.map((token) => tokenElement(token, false)));
    byId("step-text").classList.toggle("mono", answer.classList.contains("mono"));
    showTimes(step);
    showDecision(step);
    showTree(step);
    byId("panel").scrollTop = 0;
  }

  function select(index, focus) {
    options[selected].setAttribute("aria-selected", "false");
    options[selected].tabIndex = -1;
    selected = Math.max(0, Math.min(steps.length - 1, index));
    options[selected].setAttribute("aria-selected", "true");
    options[selected].tabIndex = 0;
    if (focus) options[selected].focus();
    show(selected);
  }

  // Where there is room for the text or for the panel, the text comes first.
  function setFolded(isFolded) {
    byId("panel").classList.toggle("folded", isFolded);
    byId("fold").setAttribute("aria-expanded", String(!isFolded));
    byId("fold").textContent = isFolded ? "Show step" : "Hide step";
  }
  byId("fold").addEventListener("click", () => setFolded(byId("fold").getAttribute("aria-expanded") === "true"));
  setFolded(true);

  const stepAt = (event) => event.target.closest("[data-step]")?.dataset.step;
  for (const area of [answer, bars]) {
    area.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && stepAt(event) !== undefined) show(Number(stepAt(event)));
    });
    area.addEventListener("pointerleave", () => show(selected));
    area.addEventListener("click", (event) => {
      if (stepAt(event) !== undefined) select(Number(stepAt(event)), area === answer);
    });
  }
  const moves = {
    ArrowRight: (at) => at + 1, ArrowDown: (at) => at + 1, ArrowLeft: (at) => at - 1, ArrowUp: (at) => at - 1,
    PageDown: (at) => at + 10, PageUp: (at) => at - 10, Home: () => 0, End: () => steps.length - 1,
  };
  answer.addEventListener("keydown", (event) => {
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(moves[event.key](selected), true);
  });
  // Begin at the step with the most tokens.
  select(steps.reduce((best, step, index) => step.tokens.length > steps[best].tokens.length ? index : best, 0), false);
})();
