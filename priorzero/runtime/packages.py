"""How to install the optional packages. Their versions are those of the extras in pyproject.toml."""

from __future__ import annotations

# Module -> what to type.
INSTALL = {
    "minigrid": "pip install minigrid==3.2.0",
    "ray": "pip install ray==2.60.0",
    "wandb": "pip install wandb==0.31.0",
}
