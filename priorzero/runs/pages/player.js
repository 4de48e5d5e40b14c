"use strict";
// Steps through episodes. All text is set as textContent: a game can print anything.
(function () {
  const { episodes, modes } = JSON.parse(document.getElementById("data").textContent);
  if (!episodes.length) return;
  const at = (id) => document.getElementById(id);
  const severalGames = new Set(episodes.map((e) => e.game)).size > 1;
  let episode = episodes[0];
  let position = 0; // of the step; episode.steps.length is the end of the episode
  let curves = []; // of the episode
  let range = [0, 1]; // of its Q-values, with 0

  function element(tag, { text = "", className = "" } = {}, children = []) {
    const made = document.createElement(tag);
    made.className = className;
    if (text) made.textContent = text;
    made.append(...children);
    return made;
  }

  const isNumber = (value) => value !== null && value !== undefined;

  // Two decimals; two significant digits below 0.1; below 0.01 as -7e-5, so that columns stay narrow.
  function number(value, digits = 2) {
    if (!isNumber(value)) return "–";
    if (value && Math.abs(value) < 0.01) return value.toExponential(0);
    return String(Number(Math.abs(value) < 0.1 ? value.toPrecision(2) : value.toFixed(digits)));
  }

  // A number with a bar below it; `share` is the filled part of the bar, from 0 to 1.
  function withBar(tag, className, text, share) {
    const fill = element("i");
    fill.style.width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`;
    return element(tag, { className }, [text, element("span", { className: "bar" }, [fill])]);
  }

  function percent(value) {
    return isNumber(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%` : "–";
  }

  const shareOfRange = (value) => (isNumber(value) ? (value - range[0]) / (range[1] - range[0]) : 0);

  // ---- the actions and the search tree ----

  // The columns that this step has: title, text and share of the bar of the action with this number.
  function columnsOf(step) {
    const columns = [];
    const add = (title, values, text, share) => {
      if (values) columns.push([title, (k) => withBar("td", `cell ${title.replace(" ", "-")}`, text(values[k]), share(values[k]))]);
    };
    const total = (step.visit_counts || []).reduce((sum, count) => sum + count, 0);
    add("LLM prior", step.prior_probs, percent, (value) => value);
    add("policy", step.policy_probs, percent, (value) => value);
    add("visits", step.visit_counts, String, (count) => count / total);
    add("Q", step.action_values, number, shareOfRange);
    return columns;
  }

  function showActions(step) {
    const columns = columnsOf(step);
    const weights = step.visit_counts || step.prior_probs || step.valid_actions.map(() => 0);
    const rank = (k) => [weights[k], step.prior_probs ? step.prior_probs[k] : 0];
    const order = step.valid_actions.map((_, k) => k);
    order.sort((a, b) => rank(b)[0] - rank(a)[0] || rank(b)[1] - rank(a)[1] || a - b);
    const titles = [["action"], ...columns].map(([title]) => element("th", { text: title }));
    const rows = order.map((k) => {
      const chosen = k === step.chosen;
      const name = element("td", { text: (chosen ? "➤ " : "") + step.valid_actions[k] });
      return element("tr", { className: chosen ? "chosen" : "" }, [name, ...columns.map(([, make]) => make(k))]);
    });
    at("actions").replaceChildren(element("tr", {}, titles), ...rows);
    at("actions").parentElement.scrollTop = 0;
  }

  function nodeOf(node, total, { chosen = false } = {}) {
    const cells = [
      element("span", { className: "name", text: (chosen ? "➤ " : "") + node.action }),
      withBar("span", "", String(node.visit_count), node.visit_count / total),
      element("span", { text: number(node.action_value) }),
      element("span", { text: number(node.reward) }),
      element("span", { text: percent(node.prior) }),
    ];
    const className = chosen ? "row chosen" : "row";
    if (!node.children.length) return element("div", { className: `${className} leaf` }, cells);
    const made = element("details", {}, [element("summary", { className }, cells), nodesOf(node.children, total)]);
    made.open = chosen;
    return made;
  }

  function nodesOf(nodes, total, chosen = null) {
    const sorted = [...nodes].sort((a, b) => b.visit_count - a.visit_count || b.prior - a.prior);
    const made = sorted.map((node) => nodeOf(node, total, { chosen: node.action === chosen }));
    return element("div", { className: "nodes" }, made);
  }

  function showTree(step) {
    at("tree").hidden = !step || !step.tree;
    if (at("tree").hidden) return;
    const total = step.visit_counts.reduce((sum, count) => sum + count, 0);
    at("tree").querySelector("summary").textContent = `the search tree: ${total} simulations, to depth 3`;
    at("nodes").replaceChildren(nodesOf(step.tree, total, step.valid_actions[step.chosen]));
    at("unfold").textContent = "unfold all";
  }

  function unfold() {
    const open = at("unfold").textContent === "unfold all";
    for (const node of at("nodes").querySelectorAll("details")) node.open = open;
    at("unfold").textContent = open ? "fold all" : "unfold all";
  }

  // ---- the numbers of a step ----

  function showValues(pairs) {
    const shown = pairs.filter(([, value]) => value !== null);
    at("values").replaceChildren(
      ...shown.map(([name, value]) => element("div", {}, [element("dt", { text: name }), element("dd", { text: value })]))
    );
  }

  // Predictions beside what came true; rows and columns without numbers are left out.
  function showPredictions(rows) {
    const kept = rows.filter(([, values]) => values.some(isNumber));
    const columns = ["predicted", "searched", "real"].map((title, c) => [title, c]);
    const shown = columns.filter(([, c]) => kept.some(([, values]) => isNumber(values[c])));
    const titles = ["", ...shown.map(([title]) => title)].map((text) => element("th", { text }));
    const made = kept.map(([name, values]) =>
      element("tr", {}, [
        element("td", { text: name }),
        ...shown.map(([title, c]) => element("td", { className: `number ${title}`, text: number(values[c]) })),
      ])
    );
    at("predictions").replaceChildren(...(made.length ? [element("tr", {}, titles), ...made] : []));
  }

  function scoreText(score) {
    return number(score) + (episode.max_score ? ` of ${number(episode.max_score)}` : "");
  }

  function showStep(step) {
    const before = position ? episode.steps[position - 1] : null;
    const real = episode.real_values ? episode.real_values[position] : null;
    at("text").textContent = (before ? `> ${before.valid_actions[before.chosen]}\n\n` : "") + step.raw_obs_text;
    at("text").scrollTop = 0;
    at("outcome").textContent = "";
    showActions(step);
    const scale = episode.reward_scale || 1;
    showPredictions([
      ["value of the state", [step.predicted_value, step.root_value, real]],
      [
        scale === 1 ? "reward of the action" : `reward of the action, times train.reward_scale=${number(scale)}`,
        [step.predicted_reward, null, isNumber(step.reward) ? step.reward * scale : null],
      ],
    ]);
    showValues([
      ["score before the action", scoreText(step.score)],
      ["sampled with probability", step.behaviour_prob === 1 ? null : percent(step.behaviour_prob)],
      ["prior", step.prior_source === "uniform" ? "uniform, because the LLM gave none" : null],
    ]);
    showTree(step);
    at("prompt").hidden = !step.prompt;
    at("prompt").querySelector("pre").textContent = step.prompt || "";
    at("where").textContent = `step ${position + 1} of ${episode.steps.length}`;
  }

  function showEnd() {
    const last = episode.steps[episode.steps.length - 1];
    at("text").textContent = (last ? `> ${last.valid_actions[last.chosen]}\n\n` : "") + episode.final_obs_text;
    at("outcome").textContent = `End of the episode: ${episode.outcome}.`;
    at("actions").replaceChildren();
    showPredictions([]);
    showValues([["final score", scoreText(episode.score)], ["return", number(episode.total_reward)]]);
    showTree(null);
    at("prompt").hidden = true;
    at("where").textContent = "end";
  }

  // ---- curves over the episode ----

  const HEIGHT = 96, LEFT = 40, RIGHT = 8, TOP = 6, BOTTOM = 16;

  // A curve of the episode: its lines are [label, class, values by step].
  function makeCurve(id, lines) {
    const figure = at(id), svg = figure.querySelector("svg");
    const drawn = lines.filter(([, , values]) => values.some(isNumber));
    figure.hidden = !drawn.length;
    const numbers = drawn.flatMap(([, , values]) => values.filter(isNumber));
    const low = Math.min(0, ...numbers), high = Math.max(...numbers, low + 1e-9);
    return { figure, svg, lines: drawn, low, high: high === low ? low + 1 : high };
  }

  const horizontal = (curve, n) => LEFT + (n / Math.max(1, episode.steps.length)) * (curve.width - LEFT - RIGHT);
  const vertical = (curve, v) => HEIGHT - BOTTOM - ((v - curve.low) / (curve.high - curve.low)) * (HEIGHT - TOP - BOTTOM);

  function drawCurve(curve) {
    if (curve.figure.hidden) return;
    const { svg, low, high } = curve;
    const make = (tag, attributes, text = "") => {
      const made = document.createElementNS(svg.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      made.textContent = text;
      return made;
    };
    curve.width = Math.max(200, svg.clientWidth || 500);
    svg.setAttribute("viewBox", `0 0 ${curve.width} ${HEIGHT}`);
    const right = curve.width - RIGHT, bottom = HEIGHT - BOTTOM;
    const ticks = [low, high].map((v) => make("text", { class: "end", x: LEFT - 5, y: vertical(curve, v), dy: "0.32em" }, number(v)));
    const steps = make("text", { class: "end", x: right, y: HEIGHT - 2 }, `${episode.steps.length} steps`);
    const grid = [low, high].map((v) => make("line", { class: "grid", x1: LEFT, x2: right, y1: vertical(curve, v), y2: vertical(curve, v) }));
    const lines = curve.lines.map(([, className, values]) => {
      const points = [];
      values.forEach((v, n) => { if (isNumber(v)) points.push(`${horizontal(curve, n).toFixed(1)},${vertical(curve, v).toFixed(1)}`); });
      return make("polyline", { class: className, points: points.join(" ") });
    });
    curve.cursor = make("line", { class: "cursor", y1: TOP, y2: bottom });
    curve.dots = curve.lines.map(([, className]) => make("circle", { class: `point ${className}`, r: 3.5 }));
    svg.replaceChildren(...grid, ...ticks, steps, ...lines, curve.cursor, ...curve.dots);
  }

  function moveCursor(curve) {
    if (curve.figure.hidden) return;
    const x = horizontal(curve, position).toFixed(1);
    curve.cursor.setAttribute("x1", x);
    curve.cursor.setAttribute("x2", x);
    const words = curve.lines.map(([label, className, values], n) => {
      const value = values[position];
      curve.dots[n].style.display = isNumber(value) ? "" : "none";
      curve.dots[n].setAttribute("cx", x);
      if (isNumber(value)) curve.dots[n].setAttribute("cy", vertical(curve, value).toFixed(1));
      return element("span", { className }, [`${label} `, element("b", { text: number(value) })]);
    });
    curve.figure.querySelector("figcaption").replaceChildren(...words);
  }

  function clickInto(curve, event) {
    const box = curve.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * curve.width;
    show(Math.round(((x - LEFT) / (curve.width - LEFT - RIGHT)) * episode.steps.length));
  }

  function drawCurves() {
    curves.forEach(drawCurve);
    curves.forEach(moveCursor);
  }

  function makeCurves() {
    const of = (name) => episode.steps.map((step) => step[name]);
    curves = [
      makeCurve("score-curve", [["score", "c0", [...of("score"), episode.score]]]),
      makeCurve("value-curve", [
        ["predicted value", "c1", of("predicted_value")],
        ["searched value", "c2", of("root_value")],
        ["real value", "c5", episode.real_values || []],
      ]),
    ];
    const values = episode.steps.flatMap((step) => (step.action_values || []).filter(isNumber));
    range = [values.reduce((a, b) => Math.min(a, b), 0), values.reduce((a, b) => Math.max(a, b), 0)];
    range[1] = Math.max(range[1], range[0] + 0.01); // smaller differences mean nothing
  }

  // Only the columns and values that the episode has are explained.
  function showLegend() {
    for (const entry of document.querySelectorAll("[data-for]")) {
      const name = entry.dataset.for;
      entry.hidden = name === "real_values" ? !(episode[name] || []).some(isNumber) : !episode.steps.some((step) => isNumber(step[name]));
    }
  }

  // ---- stepping ----

  function show(wanted) {
    position = Math.max(0, Math.min(episode.steps.length, wanted));
    at("slider").value = position;
    at("first").disabled = at("previous").disabled = position === 0;
    at("next").disabled = at("last").disabled = position === episode.steps.length;
    if (position < episode.steps.length) showStep(episode.steps[position]);
    else showEnd();
    curves.forEach(moveCursor);
  }

  function select(index) {
    episode = episodes[index];
    at("slider").max = episode.steps.length;
    makeCurves();
    curves.forEach(drawCurve);
    showLegend();
    show(0);
  }

  episodes.forEach((e, index) => {
    const game = severalGames || e.unseen ? `, ${e.game}${e.unseen ? " (unseen)" : ""}` : "";
    const name = `${modes[e.mode] || e.mode}${game}: score ${number(e.score)}${e.won ? ", won" : ""}`;
    const option = element("option", { text: name });
    option.value = index;
    at("episode").append(option);
  });
  at("choice").hidden = episodes.length === 1;
  at("episode").addEventListener("change", (event) => {
    select(Number(event.target.value));
    event.target.blur(); // so that the arrow keys step
  });
  at("first").addEventListener("click", () => show(0));
  at("previous").addEventListener("click", () => show(position - 1));
  at("next").addEventListener("click", () => show(position + 1));
  at("last").addEventListener("click", () => show(episode.steps.length));
  at("slider").addEventListener("input", (event) => show(Number(event.target.value)));
  at("unfold").addEventListener("click", unfold);
  for (const id of ["score-curve", "value-curve"]) {
    const svg = at(id).querySelector("svg");
    const go = (event) => clickInto(curves.find((curve) => curve.svg === svg), event);
    svg.addEventListener("pointerdown", go);
    svg.addEventListener("pointermove", (event) => { if (event.buttons & 1) go(event); });
  }
  window.addEventListener("resize", drawCurves);
  const keys = {
    ArrowLeft: () => position - 1, ArrowRight: () => position + 1, Home: () => 0, End: () => episode.steps.length,
  };
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // shortcuts of the browser
    if (/^(SELECT|INPUT|TEXTAREA)$/.test(event.target.tagName || "")) return; // they use these keys themselves
    if (!Object.hasOwn(keys, event.key)) return;
    show(keys[event.key]());
    event.preventDefault();
  });
  at("player").hidden = false;
  select(0);
})();
