"""PriorZero: language-model priors for world-model planning in text games."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``priorzero.register_game``. It is imported when it is used, so that ``import priorzero`` takes no time."""
    if name == "register_game":
        from priorzero.envs.registry import register_game

        return register_game
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
