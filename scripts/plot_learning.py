"""Tables and learning curves from the results of scripts/benchmark_learning.py.

    python scripts/plot_learning.py bench_results/learning/results.jsonl
    python scripts/plot_learning.py A/results.jsonl B/results.jsonl --table table.md --plot curves.svg --by wall
    python scripts/plot_learning.py bench_results/learning/results.jsonl --each solved_at

A row of the table is an agent (and label) on a set of games. All settings of its runs must be equal, except for the
game and the seed. If a run was made twice with different settings, the later one is used, and this is printed. Scores
are fractions of the maximum score of a game. Means are taken over episodes, then over games, then over seeds. The
deviation (± in the table, the band in the figure) is the sample standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_tools import at_least, exit_code
from benchmark_learning import AGENTS, GAME_SETS, MODE_OF, game_set_of, key_of, read_results, solved_index

from priorzero.types import UserError

Line = Mapping[str, Any]
ENV_STEP, RETURN, SCORE, WON, WALL_S = range(5)  # positions in an episode of a line

# The palette of Okabe and Ito, which readers with colour vision deficiency can distinguish.
COLOURS = {
    "random": "#555555",
    "prior": "#CC79A7",
    "unizero": "#0072B2",
    "priorzero_frozen": "#E69F00",
    "priorzero_sft": "#009E73",
    "priorzero_sft_rft": "#D55E00",
}
FIGURES = ("solved_at", "first_win_at", "mean_score", "last_mean_score", "best_score", "wall_s")  # for --each
GREEDY_MODES = ("world_model", "world_model_with_prior", "prior")  # evaluation modes that do not sample
LABEL_DASHES = ((5, 2), (1, 1), (5, 1, 1, 1), (3, 1, 1, 1, 1, 1))  # line styles of an agent's labels


@dataclass(frozen=True)
class Row:
    """The runs of one agent, label and number of environment steps on one set of games."""

    game_set: str
    agent: str
    label: str
    env_steps: int
    lines: Sequence[Line]

    @property
    def name(self) -> str:
        """Agent and label."""
        return row_name(self.lines[0])

    @property
    def learns(self) -> bool:
        """Whether the agent learns."""
        return self.agent not in MODE_OF

    @property
    def games(self) -> list[str]:
        """The games of its runs."""
        return list(dict.fromkeys(line["game"] for line in self.lines))

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return sorted({line["seed"] for line in self.lines})

    def means_over_games(self, figure: Callable[[Line], float]) -> list[float]:
        """The mean of a figure over the games, for each seed."""
        return [statistics.fmean(figure(line) for line in self.lines if line["seed"] == seed) for seed in self.seeds]


# ---- reading ----


def row_name(line: Line) -> str:
    """Agent and label of a run, as they are named in tables."""
    return f"{line['agent']} ({line['label']})" if line["label"] else str(line["agent"])


def read_rows(files: Sequence[Path]) -> list[Row]:
    """The rows of all files: sets of games in the order of their first line, agents in the order of ``AGENTS``.

    Raises:
        UserError: there are no lines, the settings of a row's runs differ, a game has no maximum score, or there are no
            runs of the agent random.
    """
    by_row: dict[tuple[str, str, str, int], list[Line]] = {}
    for line in latest_lines(files):
        key = game_set_of(line["game"]), line["agent"], line["label"], line["env_steps"]
        by_row.setdefault(key, []).append(line)
    rows = [Row(*key, lines) for key, lines in by_row.items()]
    for row in rows:
        if len({line["digest"] for line in row.lines}) > 1:
            raise UserError(
                f"{row.game_set}, {row.name}: its runs have different settings; run all of its games and seeds with "
                "the same settings, or give the runs different labels with --label"
            )
    sets, agents = list(dict.fromkeys(row.game_set for row in rows)), list(AGENTS)
    for game_set in sets:
        _check_random([row for row in rows if row.game_set == game_set], files[0])
    return sorted(rows, key=lambda r: (sets.index(r.game_set), agents.index(r.agent), r.label, r.env_steps))


def latest_lines(files: Sequence[Path]) -> list[Line]:
    """The lines of all files; of several lines of the same run, the last."""
    latest: dict[tuple[Any, ...], Line] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; scripts/benchmark_learning.py writes it")
        for line in read_results(file):
            *run, digest = key_of(line)
            name = f"{line['agent']}, {line['game']}, seed {line['seed']}"
            if line["max_score"] <= 0:
                raise UserError(f"{name}: the maximum score is {line['max_score']:g}, so there is no fraction of it")
            if latest.get(tuple(run), line)["digest"] != digest:
                print(f"{name}: there are two runs with different settings; the later one is used", file=sys.stderr)
            latest[tuple(run)] = line
    if not latest:
        raise UserError(f"{', '.join(map(str, files))}: no lines; run scripts/benchmark_learning.py")
    return list(latest.values())


def _check_random(rows: Sequence[Row], file: Path) -> None:
    """Raises UserError if a game of a set was not played by the agent random."""
    played = {game for row in rows if row.agent == "random" for game in row.games}
    missing = [game for game in dict.fromkeys(game for row in rows for game in row.games) if game not in played]
    if missing:
        game_set = rows[0].game_set
        names = game_set if set(missing) == set(GAME_SETS.get(game_set, ())) else ",".join(missing)
        raise UserError(
            f"{game_set}: there are no runs of the agent random for comparison on {', '.join(missing)}; type: python "
            f"scripts/benchmark_learning.py --agents random --games '{names}' --out {file.parent} (and the --config of "
            "the other runs)"
        )


# ---- figures ----


def mean_score(line: Line) -> float:
    """Mean score of all episodes, as a fraction of the maximum score."""
    return line["mean_score"] / line["max_score"]


def last_quarter_score(line: Line) -> float:
    """The same for the episodes that ended in the last quarter of the environment steps; NaN if there are none."""
    scores = [e[SCORE] for e in line["episodes"] if e[ENV_STEP] > 0.75 * line["env_steps"]]
    return statistics.fmean(scores) / line["max_score"] if scores else math.nan


def best_score(line: Line) -> float:
    """Best score, as a fraction of the maximum score."""
    return line["best_score"] / line["max_score"]


def solved_at(line: Line, by: int) -> float:
    """When a run was solved: environment step or seconds (``by``: ``ENV_STEP`` or ``WALL_S``); infinity if never."""
    index = solved_index([e[WON] for e in line["episodes"]])
    return math.inf if index is None else line["episodes"][index][by]


def greedy_wins(row: Row) -> str:
    """The fraction of wins in the last evaluation in each of ``GREEDY_MODES``, as mean over the runs."""
    fractions = []
    for mode in GREEDY_MODES:
        last = [line["evaluations"][mode] for line in row.lines if mode in line["evaluations"]]
        fractions.append(f"{statistics.fmean(e['wins'] / e['episodes'] for e in last):.2f}" if last else "-")
    return ", ".join(fractions)


# ---- tables ----


def table_cells(row: Row, by: int) -> list[str]:
    """The cells of a row of the table."""
    num_runs, expected = len(row.lines), len(row.games) * len(row.seeds)
    cells = [
        f"{row.game_set}: {row.name}",
        ("" if num_runs == expected else f"{num_runs} of ") + f"{len(row.games)} x {len(row.seeds)}",
        f"{row.env_steps}" if row.learns else "-",
        ", ".join(map(str, sorted({line["simulations"] for line in row.lines}))) if row.learns else "-",
        _mean_and_deviation(row.means_over_games(mean_score)),
        _mean_and_deviation(row.means_over_games(last_quarter_score)) if row.learns else "-",
        _number(statistics.fmean(row.means_over_games(best_score))),
    ]
    if row.learns:
        times = [solved_at(line, by) for line in row.lines]
        median = statistics.median(times)
        cells.append(f"{sum(map(math.isfinite, times)) / num_runs:.2f}")
        cells.append(f"{median:.0f}" if math.isfinite(median) else "never")
    else:
        cells += ["-", "-"]
    return [*cells, greedy_wins(row), f"{statistics.fmean(line['wall_s'] for line in row.lines):.0f}"]


def main_table(rows: Sequence[Row], by: int) -> str:
    """A Markdown table and an explanation of its columns."""
    unit = "env steps" if by == ENV_STEP else "seconds"
    head = [
        "games: agent", "games x seeds", "env steps", "simulations", "mean score", "in the last 25%", "best episode",
        "runs solved", f"{unit} to solved", "won by greedy play at the end: world model, with prior, LLM alone",
        "wall time a run, s",
    ]  # fmt: skip
    max_scores: dict[str, list[float]] = {}
    for row in rows:
        max_scores.setdefault(row.game_set, []).extend(line["max_score"] for line in row.lines)
    scores = "; ".join(f"{name} {_range(values)}" for name, values in max_scores.items())
    return markdown(head, [table_cells(row, by) for row in rows]) + (
        "\nScores are fractions of a game's maximum score: the mean of all training episodes, the mean of those in the "
        "last 25% of the env steps, and the best episode of each run (random and prior do not train: all their "
        "episodes). ± is the standard deviation over seeds. A run is solved at the first of five consecutive wins. "
        f"The {unit} to solved are the median over all runs; runs that are never solved count as later than all "
        f"others. All agents are given the valid actions. Maximum scores: {scores}.\n"
    )


def run_table(rows: Sequence[Row], figure: str) -> str:
    """A Markdown table of one of ``FIGURES`` for each set of games: a line for each game, a column for each row.

    A cell contains the values of all seeds, in order. A dash is a run that is missing or does not have the figure
    (never solved, never won). Rows in which no run has the figure are left out.
    """
    tables = []
    for game_set in dict.fromkeys(row.game_set for row in rows):
        columns = [
            row for row in rows if row.game_set == game_set and any(line[figure] is not None for line in row.lines)
        ]
        titles = [f"{row.name}, {row.env_steps} steps" if row.learns else row.name for row in columns]
        games = dict.fromkeys(game for row in columns for game in row.games)
        cells = [[game, *(_run_cell(row, game, figure) for row in columns)] for game in games]
        tables.append(markdown([f"{game_set}: {figure}", *titles], cells))
    return "\n".join(tables)


def _run_cell(row: Row, game: str, figure: str) -> str:
    by_seed = {line["seed"]: line[figure] for line in row.lines if line["game"] == game}
    return ", ".join("-" if by_seed.get(seed) is None else f"{by_seed[seed]:.4g}" for seed in row.seeds)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2 or math.isnan(mean):
        return _number(mean)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))


# ---- curves ----


def bin_means(points: Sequence[tuple[float, float]], *, end: float, bins: int) -> list[float]:
    """Means of the values of ``(x, value)`` in ``bins`` equal intervals of ]0, end].

    An empty interval gets the mean of the interval before it, or NaN before the first point. Points beyond ``end`` are
    ignored.
    """
    values: list[list[float]] = [[] for _ in range(bins)]
    for x, value in points:
        if x <= end:
            values[min(bins, max(1, math.ceil(x * bins / end))) - 1].append(value)
    means: list[float] = []
    for own in values:
        means.append(statistics.fmean(own) if own else means[-1] if means else math.nan)
    return means


def learning_curve(row: Row, *, by: int, bins: int) -> tuple[list[float], list[float], list[float]]:
    """The middles of the bins, and the mean and the deviation of the return as a fraction of the maximum score.

    By wall time, the curve ends where the shortest run ends. A bin is NaN if some run has no episode up to there. The
    deviation is NaN if there is one seed.
    """
    end = float(row.env_steps) if by == ENV_STEP else min(line["episodes"][-1][WALL_S] for line in row.lines)
    curves = {
        id(line): bin_means([(e[by], e[RETURN] / line["max_score"]) for e in line["episodes"]], end=end, bins=bins)
        for line in row.lines
    }
    means, deviations = [], []
    for n in range(bins):
        by_seed = row.means_over_games(lambda line, n=n: curves[id(line)][n])
        mean = statistics.fmean(by_seed)
        means.append(mean)
        has_deviation = len(by_seed) > 1 and not math.isnan(mean)
        deviations.append(statistics.stdev(by_seed) if has_deviation else math.nan)
    return [(n + 0.5) * end / bins for n in range(bins)], means, deviations


def mean_return(row: Row) -> float:
    """Mean return of an agent that does not learn, as a fraction of the maximum score."""
    mode = MODE_OF[row.agent]
    return statistics.fmean(
        row.means_over_games(lambda line: line["evaluations"][mode]["mean_return"] / line["max_score"])
    )


def draw(rows: Sequence[Row], target: Path, *, by: int, bins: int) -> None:
    """Draw one panel for each set of games.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context  # only here, since the tables do not need it
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); type pip install matplotlib") from error
    sets = list(dict.fromkeys(row.game_set for row in rows))
    columns = min(3, len(sets))
    height = math.ceil(len(sets) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.4 * height + 0.8), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False, sharey=True).flat)
    legend: dict[str, Any] = {}
    for game_set, panel in zip(sets, panels, strict=False):
        for row in (row for row in rows if row.game_set == game_set):
            legend.setdefault(row.name, _draw_row(panel, row, style=_line_style(row, rows), by=by, bins=bins))
        panel.set_title(game_set, fontsize=10)
        panel.set_xlabel("environment steps" if by == ENV_STEP else "wall time, s")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(sets) :]:
        panel.set_visible(False)
    low, high = panels[0].get_ylim()  # all panels share it
    panels[0].set_ylim(min(0.0, low), high)
    figure.supylabel("return, fraction of the maximum", fontsize=10)
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=min(2 * columns, len(legend)), frameon=False
    )
    # Without a date and with fixed ids, equal results give equal files.
    options = {"metadata": {"Date": None}} if target.suffix == ".svg" else {"dpi": 150}
    with rc_context({"svg.hashsalt": "priorzero", "svg.fonttype": "none"}):
        figure.savefig(target, **options)


def _line_style(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """The colour depends on the agent, the dashes on the label."""
    labels = list(dict.fromkeys(r.label for r in rows if r.agent == row.agent and r.label))
    style: dict[str, Any] = {"color": COLOURS[row.agent], "linewidth": 1.6}
    if row.label:
        style["dashes"] = LABEL_DASHES[labels.index(row.label) % len(LABEL_DASHES)]
    elif row.agent == "random":
        style["linestyle"] = "dashed"
    elif row.agent == "prior":
        style["linestyle"] = "dotted"
    return style


def _draw_row(panel: Any, row: Row, *, style: dict[str, Any], by: int, bins: int) -> Any:
    """Draw a curve, or a horizontal line for an agent that does not learn."""
    if not row.learns:
        return panel.axhline(mean_return(row), **style)
    x, means, deviations = learning_curve(row, by=by, bins=bins)
    (curve,) = panel.plot(x, means, **style)
    low, high = zip(*((m - d, m + d) for m, d in zip(means, deviations, strict=True)), strict=True)
    panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return curve


# ---- command line ----


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a name that ends in .svg or .png")
    return Path(text)


def run(options: argparse.Namespace) -> None:
    """Print or write the tables, and draw the curves.

    Raises:
        UserError: the results cannot be read or compared, or matplotlib is missing.
    """
    by = ENV_STEP if options.by == "steps" else WALL_S
    rows = read_rows(options.results)
    table = main_table(rows, by)
    if options.each is not None:
        table += "\n" + run_table(rows, options.each)
    if options.table is None:
        print(table, end="")
    else:
        options.table.write_text(table, encoding="utf-8")
    if options.plot is not None:
        draw(rows, options.plot, by=by, bins=options.bins)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.jsonl of scripts/benchmark_learning.py")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table to a file (default: print it)")
    parser.add_argument("--plot", type=_picture, metavar="FILE.svg|.png", help="draw learning curves")
    parser.add_argument("--each", choices=FIGURES, help="add a table of this figure for every run")
    parser.add_argument(
        "--by", choices=("steps", "wall"), default="steps", help="unit of the x axis and of the time to solved"
    )
    parser.add_argument("--bins", type=at_least(1), default=20, help="number of bins of the x axis (default: 20)")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
