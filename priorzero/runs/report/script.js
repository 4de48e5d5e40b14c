"use strict";
// Steps through the episodes of the last evaluation. All text is set as textContent: a game can print anything.
(function () {
  const { episodes, modes } = JSON.parse(document.getElementById("data").textContent);
  if (!episodes.length) return;
  const at = (id) => document.getElementById(id);
  const severalGames = new Set(episodes.map((e) => e.game)).size > 1;
  let episode = episodes[0];
  let position = 0; // of the step; episode.steps.length is the end of the episode

  function element(tag, { text = "", className = "" } = {}, children = []) {
    const made = document.createElement(tag);
    made.className = className;
    if (text) made.textContent = text;
    made.append(...children);
    return made;
  }

  function number(value, digits = 2) {
    return value === null ? "–" : String(Number(value.toFixed(digits)));
  }

  // A cell with a number and a bar; `share` is the filled part of the bar, from 0 to 1.
  function cell(text, share) {
    const fill = element("i");
    fill.style.width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`;
    return element("td", { className: "cell" }, [text, element("span", { className: "bar" }, [fill])]);
  }

  function probability(value) {
    return cell(value === null ? "–" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`, value);
  }

  // The columns that this step has: title, and a function from the action's number to its cell.
  function columnsOf(step) {
    const columns = [];
    if (step.prior_probs) columns.push(["LLM prior", (k) => probability(step.prior_probs[k])]);
    if (step.policy_probs) columns.push(["policy", (k) => probability(step.policy_probs[k])]);
    if (step.visit_counts) {
      const total = step.visit_counts.reduce((sum, count) => sum + count, 0);
      columns.push(["visits", (k) => cell(String(step.visit_counts[k]), step.visit_counts[k] / total)]);
    }
    if (step.action_values) {
      columns.push(["value", (k) => element("td", { text: number(step.action_values[k]), className: "number" })]);
    }
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
  }

  function showValues(pairs) {
    const shown = pairs.filter(([, value]) => value !== null);
    at("values").replaceChildren(
      ...shown.map(([name, value]) => element("div", {}, [element("dt", { text: name }), element("dd", { text: value })]))
    );
  }

  function scoreText(score) {
    return number(score) + (episode.max_score ? ` of ${number(episode.max_score)}` : "");
  }

  function showStep(step) {
    const before = position ? episode.steps[position - 1] : null;
    at("text").textContent = (before ? `> ${before.valid_actions[before.chosen]}\n\n` : "") + step.raw_obs_text;
    at("outcome").textContent = "";
    showActions(step);
    showValues([
      ["reward of the action", number(step.reward)],
      ["score before it", scoreText(step.score)],
      ["predicted value", step.predicted_value === null ? null : number(step.predicted_value)],
      ["searched value", step.root_value === null ? null : number(step.root_value)],
      ["sampled with probability", step.behaviour_prob === 1 ? null : number(step.behaviour_prob, 3)],
      ["prior", step.prior_source === "uniform" ? "uniform, because the LLM gave none" : null],
    ]);
    at("prompt").hidden = !step.prompt;
    at("prompt").querySelector("pre").textContent = step.prompt || "";
    at("where").textContent = `step ${position + 1} of ${episode.steps.length}`;
  }

  function showEnd() {
    const last = episode.steps[episode.steps.length - 1];
    const end = episode.won ? "won" : episode.truncated ? "the limit of moves was reached" : "the game ended without a win";
    at("text").textContent = (last ? `> ${last.valid_actions[last.chosen]}\n\n` : "") + episode.final_obs_text;
    at("outcome").textContent = `End of the episode: ${end}.`;
    at("actions").replaceChildren();
    showValues([["final score", scoreText(episode.score)], ["return", number(episode.total_reward)]]);
    at("prompt").hidden = true;
    at("where").textContent = "end";
  }

  function show(wanted) {
    position = Math.max(0, Math.min(episode.steps.length, wanted));
    at("slider").value = position;
    at("first").disabled = at("previous").disabled = position === 0;
    at("next").disabled = at("last").disabled = position === episode.steps.length;
    if (position < episode.steps.length) showStep(episode.steps[position]);
    else showEnd();
  }

  function select(index) {
    episode = episodes[index];
    at("slider").max = episode.steps.length;
    show(0);
  }

  episodes.forEach((e, index) => {
    const game = severalGames || e.unseen ? `, ${e.game}${e.unseen ? " (unseen)" : ""}` : "";
    const name = `${modes[e.mode] || e.mode}${game}: score ${number(e.score)}${e.won ? ", won" : ""}`;
    const option = element("option", { text: name });
    option.value = index;
    at("episode").append(option);
  });
  at("episode").addEventListener("change", (event) => {
    select(Number(event.target.value));
    event.target.blur(); // so that the arrow keys step
  });
  at("first").addEventListener("click", () => show(0));
  at("previous").addEventListener("click", () => show(position - 1));
  at("next").addEventListener("click", () => show(position + 1));
  at("last").addEventListener("click", () => show(episode.steps.length));
  at("slider").addEventListener("input", (event) => show(Number(event.target.value)));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // shortcuts of the browser
    if (/^(SELECT|INPUT|TEXTAREA)$/.test(event.target.tagName || "")) return; // they use these keys themselves
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    show(position + (event.key === "ArrowRight" ? 1 : -1));
    event.preventDefault();
  });
  at("player").hidden = false;
  select(0);
})();
