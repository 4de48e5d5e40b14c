"""Tables and learning curves from what scripts/benchmark_learning.py measured.

    python scripts/plot_learning.py bench_results/learning/results.jsonl
    python scripts/plot_learning.py A/results.jsonl B/results.jsonl --table table.md --plot curves.svg --by wall
    python scripts/plot_learning.py bench_results/learning/results.jsonl --each solved_at

A row is an agent (and label) on a set of games; its runs must agree in all settings but game and seed. Where a run was
made twice with different settings, the later line counts, and this is said. Shares are of the most points a game can
give. A mean is taken over episodes, then over games, then over seeds; a deviation (±, the band) is the sample deviation
over seeds, where there are two or more.
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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from benchmark_learning import AGENTS, GAME_SETS, MODE_OF, key_of, read_results, set_of, solved_index

from priorzero.types import UserError

Line = Mapping[str, Any]
ENV_STEP, RETURN, SCORE, WON, WALL_S = range(5)  # places in an episode of a line

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = {
    "random": "#555555",
    "prior": "#CC79A7",
    "unizero": "#0072B2",
    "priorzero_frozen": "#E69F00",
    "priorzero_sft": "#009E73",
    "priorzero_sft_rft": "#D55E00",
}
FIGURES = ("solved_at", "first_win_at", "mean_score", "last_mean_score", "best_score", "wall_s")  # --each
GREEDY = ("world_model", "world_model_with_prior", "prior")  # modes of evaluation without chance
LABEL_DASHES = ((5, 2), (1, 1), (5, 1, 1, 1), (3, 1, 1, 1, 1, 1))  # the lines of an agent's labels, in turn


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
        return f"{self.agent} ({self.label})" if self.label else self.agent

    @property
    def learns(self) -> bool:
        return self.agent not in MODE_OF

    @property
    def games(self) -> list[str]:
        return list(dict.fromkeys(line["game"] for line in self.lines))

    @property
    def seeds(self) -> list[int]:
        return sorted({line["seed"] for line in self.lines})

    def over_games(self, figure: Callable[[Line], float]) -> list[float]:
        """For each seed, the mean over its games."""
        return [statistics.fmean(figure(line) for line in self.lines if line["seed"] == seed) for seed in self.seeds]


def read_rows(files: Sequence[Path]) -> list[Row]:
    """The rows of all files, sets of games in the order of their first line, agents in that of ``AGENTS``.

    Raises:
        UserError: no lines; runs of a row that differ in settings; a game that gives no points; no random row.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; scripts/benchmark_learning.py writes it")
    latest: dict[tuple[Any, ...], Line] = {}
    for line in (line for file in files for line in read_results(file)):
        *run, _ = key = key_of(line)
        if tuple(run) in latest and key_of(latest[tuple(run)]) != key:
            print(
                f"{line['agent']}, {line['game']}, seed {line['seed']}: the later of two lines counts", file=sys.stderr
            )
        latest[tuple(run)] = line
        if line["max_score"] <= 0:
            raise UserError(
                f"{line['game']}: the most points are {line['max_score']:g}, so there are no shares of them"
            )
    if not latest:
        raise UserError(f"{', '.join(map(str, files))}: no line yet; run scripts/benchmark_learning.py")
    by_row: dict[tuple[Any, ...], list[Line]] = {}
    for line in latest.values():
        by_row.setdefault((set_of(line["game"]), line["agent"], line["label"], line["env_steps"]), []).append(line)
    rows = [Row(*key, lines) for key, lines in by_row.items()]
    for row in rows:
        if len({line["digest"] for line in row.lines}) > 1:
            raise UserError(
                f"{row.game_set}, {row.name}: its runs have different settings; run all of its games and seeds with "
                "the same ones, or tell them apart with --label"
            )
    sets, agents = list(dict.fromkeys(row.game_set for row in rows)), list(AGENTS)
    for game_set in sets:
        _check_random([row for row in rows if row.game_set == game_set], files[0])
    return sorted(rows, key=lambda r: (sets.index(r.game_set), agents.index(r.agent), r.label, r.env_steps))


def _check_random(rows: Sequence[Row], file: Path) -> None:
    played = {game for row in rows if row.agent == "random" for game in row.games}
    games = list(dict.fromkeys(game for row in rows for game in row.games))
    missing = [game for game in games if game not in played]
    if missing:
        game_set = rows[0].game_set
        names = game_set if set(missing) == set(GAME_SETS.get(game_set, ())) else ",".join(missing)
        raise UserError(
            f"{game_set}: there is no random row to compare with for {', '.join(missing)}; run: python "
            f"scripts/benchmark_learning.py --agents random --games '{names}' --out {file.parent} (and the --config of "
            "the other runs)"
        )


# ---- figures ----


def mean_share(line: Line) -> float:
    """Mean score of all episodes, as share of the most points."""
    return line["mean_score"] / line["max_score"]


def last_quarter_share(line: Line) -> float:
    """The same of the episodes that ended in the last quarter of the environment steps; NaN if none did."""
    scores = [e[SCORE] for e in line["episodes"] if e[ENV_STEP] > 0.75 * line["env_steps"]]
    return statistics.fmean(scores) / line["max_score"] if scores else math.nan


def best_share(line: Line) -> float:
    return line["best_score"] / line["max_score"]


def solved(line: Line, by: int) -> float:
    """Environment step or second (``by``: ``ENV_STEP`` or ``WALL_S``) at which a run was solved; infinity if never."""
    index = solved_index([e[WON] for e in line["episodes"]])
    return math.inf if index is None else line["episodes"][index][by]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _with_deviation(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2 or math.isnan(mean):
        return _number(mean)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def greedy_wins(row: Row) -> str:
    """For each mode of ``GREEDY``, the share of the last evaluation's episodes that were won, mean over the runs."""
    shares = []
    for mode in GREEDY:
        last = [line["evaluations"][mode] for line in row.lines if mode in line["evaluations"]]
        shares.append(f"{statistics.fmean(e['wins'] / e['episodes'] for e in last):.2f}" if last else "-")
    return ", ".join(shares)


def _from_to(values: Sequence[float]) -> str:
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def cells_of(row: Row, by: int) -> list[str]:
    """A row of the table."""
    runs, whole = len(row.lines), len(row.games) * len(row.seeds)
    simulations = sorted({line["simulations"] for line in row.lines})
    cells = [
        f"{row.game_set}: {row.name}",
        ("" if runs == whole else f"{runs} of ") + f"{len(row.games)} x {len(row.seeds)}",
        f"{row.env_steps}" if row.learns else "-",
        ", ".join(map(str, simulations)) if row.learns else "-",
        _with_deviation(row.over_games(mean_share)),
        _with_deviation(row.over_games(last_quarter_share)) if row.learns else "-",
        _number(statistics.fmean(row.over_games(best_share))),
    ]
    if row.learns:
        times = [solved(line, by) for line in row.lines]
        median = statistics.median(times)
        cells.append(f"{sum(map(math.isfinite, times)) / runs:.2f}")
        cells.append(f"{median:.0f}" if math.isfinite(median) else "never")
    else:
        cells += ["-", "-"]
    return [*cells, greedy_wins(row), f"{statistics.fmean(line['wall_s'] for line in row.lines):.0f}"]


def table_of(rows: Sequence[Row], by: int) -> str:
    """A Markdown table and what its columns mean."""
    unit = "env steps" if by == ENV_STEP else "seconds"
    head = [
        "games: agent", "games x seeds", "env steps", "simulations", "mean score", "in the last 25%", "best episode",
        "runs solved", f"{unit} to solved", "won by greedy play at the end: world model, with prior, LLM alone",
        "wall time a run, s",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *(cells_of(row, by) for row in rows)]
    most: dict[str, list[float]] = {}
    for row in rows:
        most.setdefault(row.game_set, []).extend(line["max_score"] for line in row.lines)
    points = "; ".join(f"{name} {_from_to(values)}" for name, values in most.items())
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (
        "\nScores are shares of the most points a game can give: the mean of all training episodes, of those in the "
        "last 25% of the env steps, and of each run's best (random and prior: of all episodes, they do not train); ± "
        f"is the deviation over seeds. Solved is the first of five won episodes in a row; {unit} to solved is the "
        "median over all runs, those never solved counting as later than any. All agents are given the valid actions. "
        f"Most points a game can give: {points}.\n"
    )


def each_of(rows: Sequence[Row], figure: str) -> str:
    """For each set of games a Markdown table of one of ``FIGURES``: a line a game, a column a row, seeds in order.

    A dash is a run that has no such figure (never solved, never won), or one that was not made; rows without any are
    left out.
    """
    tables = []
    for game_set in dict.fromkeys(row.game_set for row in rows):
        columns = [
            row for row in rows if row.game_set == game_set and any(line[figure] is not None for line in row.lines)
        ]
        lines = [
            [
                f"{game_set}: {figure}",
                *(f"{row.name}, {row.env_steps} steps" if row.learns else row.name for row in columns),
            ],
            ["---"] * (len(columns) + 1),
        ]
        for game in dict.fromkeys(game for row in columns for game in row.games):
            lines.append([game, *(_each(row, game, figure) for row in columns)])
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(tables)


def _each(row: Row, game: str, figure: str) -> str:
    by_seed = {line["seed"]: line[figure] for line in row.lines if line["game"] == game}
    return ", ".join("-" if by_seed.get(seed) is None else f"{by_seed[seed]:.4g}" for seed in row.seeds)


# ---- curves ----


def binned(points: Sequence[tuple[float, float]], *, end: float, bins: int) -> list[float]:
    """Means of the values of ``(x, value)`` in ``bins`` equal parts of ]0, end].

    A part without points has the mean of the part before it; NaN before the first point. Points beyond ``end`` are left
    out.
    """
    parts: list[list[float]] = [[] for _ in range(bins)]
    for x, value in points:
        if x <= end:
            parts[min(bins, max(1, math.ceil(x * bins / end))) - 1].append(value)
    means: list[float] = []
    for part in parts:
        means.append(statistics.fmean(part) if part else means[-1] if means else math.nan)
    return means


def curve_of(row: Row, *, by: int, bins: int) -> tuple[list[float], list[float], list[float]]:
    """x (the middles of the bins), mean and deviation of the return as share of the most points.

    By wall time, it ends where the shortest run ends. A bin is NaN until an episode of every run has ended; the
    deviation is NaN with one seed.
    """
    end = float(row.env_steps) if by == ENV_STEP else min(line["episodes"][-1][WALL_S] for line in row.lines)
    curves = {
        id(line): binned([(e[by], e[RETURN] / line["max_score"]) for e in line["episodes"]], end=end, bins=bins)
        for line in row.lines
    }
    means, deviations = [], []
    for n in range(bins):
        of_seeds = row.over_games(lambda line, n=n: curves[id(line)][n])
        mean = statistics.fmean(of_seeds)
        means.append(mean)
        known = len(of_seeds) > 1 and not math.isnan(mean)
        deviations.append(statistics.stdev(of_seeds) if known else math.nan)
    return [(n + 0.5) * end / bins for n in range(bins)], means, deviations


def level_of(row: Row) -> float:
    """Mean return of an agent that does not learn, as share of the most points."""
    mode = MODE_OF[row.agent]
    return statistics.fmean(row.over_games(lambda line: line["evaluations"][mode]["mean_return"] / line["max_score"]))


def draw(rows: Sequence[Row], target: Path, *, by: int, bins: int) -> None:
    """One panel for each set of games.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context  # late: the table does without
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error}); type pip install matplotlib") from error
    sets = list(dict.fromkeys(row.game_set for row in rows))
    columns = min(3, len(sets))
    height = math.ceil(len(sets) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.4 * height + 0.8), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False, sharey=True).flat
    names: dict[str, Any] = {}  # what stands in the legend, once
    for game_set, panel in zip(sets, panels, strict=False):  # sets first: zip takes no panel too many
        for row in (row for row in rows if row.game_set == game_set):
            names.setdefault(row.name, _draw_row(panel, row, style=_style(row, rows), by=by, bins=bins))
        panel.set_title(game_set, fontsize=10)
        panel.set_xlabel("environment steps" if by == ENV_STEP else "wall time, s")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:  # what is left of the last line of panels
        panel.set_visible(False)
    low, high = figure.axes[0].get_ylim()  # of all panels, so only now
    figure.axes[0].set_ylim(min(0.0, low), high)
    figure.supylabel("return, share of the maximum", fontsize=10)
    figure.legend(
        names.values(), names.keys(), loc="outside lower center", ncols=min(2 * columns, len(names)), frameon=False
    )
    # Without a date and with fixed names inside, equal results give an equal file.
    fixed = {"metadata": {"Date": None}} if target.suffix == ".svg" else {"dpi": 150}
    with rc_context({"svg.hashsalt": "priorzero", "svg.fonttype": "none"}):
        figure.savefig(target, **fixed)


def _style(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """An agent has one colour, its labels have lines of their own."""
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
    if not row.learns:
        return panel.axhline(level_of(row), **style)
    x, means, deviations = curve_of(row, by=by, bins=bins)
    (drawn,) = panel.plot(x, means, **style)
    low, high = zip(*((m - d, m + d) for m, d in zip(means, deviations, strict=True)), strict=True)
    panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return drawn


def _bins(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on")
    return int(text)


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a name that ends in .svg or .png")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 something to put right."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="results.jsonl of scripts/benchmark_learning.py")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there (default: print it)")
    parser.add_argument("--plot", type=_picture, metavar="FILE.svg|.png", help="draw learning curves")
    parser.add_argument("--each", choices=FIGURES, help="add a table of this figure for every run")
    parser.add_argument("--by", choices=("steps", "wall"), default="steps", help="x axis and what is taken to solved")
    parser.add_argument("--bins", type=_bins, default=20, help="parts of the x axis (default: 20)")
    options = parser.parse_args(argv)
    by = ENV_STEP if options.by == "steps" else WALL_S
    try:
        rows = read_rows(options.results)
        table = table_of(rows, by)
        if options.each is not None:
            table += "\n" + each_of(rows, options.each)
        if options.table is None:
            print(table, end="")
        else:
            options.table.write_text(table, encoding="utf-8")
        if options.plot is not None:
            draw(rows, options.plot, by=by, bins=options.bins)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
