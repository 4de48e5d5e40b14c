"""Exploration strategies."""

from __future__ import annotations

from collections.abc import Sequence

from priorzero.play.exploration.base import Exploration, RootNoise
from priorzero.play.exploration.dirichlet import Dirichlet
from priorzero.play.exploration.go_explore import GoExplore
from priorzero.play.novelty import NoveltyCounts
from priorzero.settings import Settings

__all__ = ["Dirichlet", "Exploration", "GoExplore", "RootNoise", "make_exploration"]


def make_exploration(settings: Settings, counts: Sequence[NoveltyCounts]) -> Exploration:
    """The strategy that ``search.exploration`` names. Environment ``e`` uses ``counts[e % len(counts)]``."""
    name = settings.search.exploration
    if name == "dirichlet":
        return Dirichlet(settings.search.root_dirichlet_alpha)
    if name == "go_explore":
        return GoExplore(counts, deviation_prob=settings.search.deviation_prob)
    raise ValueError(f"search.exploration={name!r} is unknown; add it to make_exploration")
