"""What is exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from priorzero.envs.textworld_own import FILE_PREFIX
from priorzero.runs.checkpoint import Checkpoint
from priorzero.runs.files import TRAINING_STATE
from priorzero.settings import RunSettings, Settings

LLM_FORMS = ("merged", "adapter", "none")


@dataclass(frozen=True)
class ExportPlan:
    """An export that was checked.

    Attributes:
        checkpoint: the agent's.
        out: the folder that is written.
        form: of the LLM, one of :data:`LLM_FORMS`.
        base: the LLM before the run; "" without an LLM.
        licence: its identifier on the hub; "" if it is not known.
        push: USER/NAME on the hub; "" if nothing is uploaded.
        private: a new repository is private.
        trust_remote_code: code that comes with the LLM may run when the adapter is merged.
    """

    checkpoint: Checkpoint
    out: Path
    form: str
    base: str
    licence: str = ""
    push: str = ""
    private: bool = False
    trust_remote_code: bool = False

    @property
    def is_cluster(self) -> bool:
        """The agent was trained on a Ray cluster."""
        return TRAINING_STATE not in self.checkpoint.manifest["files"]

    @property
    def can_play(self) -> bool:
        """The export contains the LLM, if the agent has one."""
        return self.form != "none" or not self.checkpoint.settings.prior.enabled

    @property
    def settings(self) -> Settings:
        """The settings of the run, without the folders of this machine that another one does not need.

        A story file is named without its folder; the MD5 in the card identifies it.
        """
        settings = self.checkpoint.settings.model_copy(deep=True)
        settings.run.output_dir = RunSettings().output_dir
        settings.run.env_id = _without_folders(settings.run.env_id)
        settings.eval.unseen = _without_folders(settings.eval.unseen)
        return settings

    @property
    def env_ids(self) -> list[str]:
        """The names of the games that the agent was trained on."""
        return [name.strip() for name in self.settings.run.env_id.split(",") if name.strip()]

    @property
    def game_names(self) -> list[str]:
        """Their short names."""
        return list(self.checkpoint.manifest.get("games", self.env_ids))

    def local_paths(self) -> dict[str, str]:
        """The settings that name a folder of this machine, such as ``llm.path``."""
        settings = self.settings
        values = {
            "llm.path": settings.llm.path,
            "llm.adapter": settings.llm.adapter,
            "encoder.path": settings.encoder.path,
        }
        return {name: value for name, value in values.items() if value.startswith((".", "/", "~", "$"))}


def _without_folders(env_ids: str) -> str:
    return ",".join(_without_folder(name.strip()) for name in env_ids.split(","))


def _without_folder(env_id: str) -> str:
    prefix = FILE_PREFIX if env_id.startswith(FILE_PREFIX) else ""
    path = env_id.removeprefix(prefix)
    return env_id if ":" in path else prefix + path.rpartition("/")[2]
