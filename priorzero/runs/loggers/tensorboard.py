"""TensorBoard: scalars, the transcripts of evaluations as text, and the settings for the HParams plugin."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from priorzero.play.transcript import EvaluationTranscript
from priorzero.runs.loggers.base import Axis
from priorzero.runs.loggers.transcript_text import episode_name, episode_text
from priorzero.settings import Settings

EVENTS = "events.out.tfevents.*"
HPARAMS = "hparams"  # a folder in the run's; TensorBoard shows it as a run of its own
# Not hyper-parameters: where the run is.
LEFT_OUT = {"run.exp_name", "run.output_dir"}


class TensorBoardLogger:
    """Writes event files.

    The HParams plugin compares all scalars of a run that has settings. The settings are therefore in a folder of their
    own, with the scores of the last evaluation only.

    Args:
        folder: the run's.
        settings: the settings for the HParams plugin; None: they are not written.
        last: the last value of each metric, if the run is resumed.
    """

    def __init__(
        self, folder: Path, *, settings: Settings | None = None, last: Mapping[str, float] | None = None
    ) -> None:
        number = len(list(folder.glob(EVENTS)))
        self._events = _EventFile(folder, suffix=f".{number}" if number else "")
        self._hparams = None if settings is None else _HParams(folder / HPARAMS, settings, last=last or {})

    def write(self, scalars: Mapping[str, float], *, step: int, axis: Axis) -> None:
        """Write scalars and flush the file. TensorBoard knows no names of axes."""
        self._events.write(_scalars(scalars), step=step)

    def write_evaluation(
        self, scalars: Mapping[str, float], *, transcripts: Sequence[EvaluationTranscript], env_step: int
    ) -> None:
        """Write scalars; one text for each transcript; and the scores for the HParams plugin."""
        from tensorboardX.summary import text

        texts = [text(f"evaluator_text/{episode_name(e)}", _as_markdown(episode_text(e))) for e in transcripts]
        self._events.write([*_scalars(scalars), *texts], step=env_step)
        if self._hparams is not None:
            self._hparams.write_scores(scalars, step=env_step)

    def close(self, *, failed: bool) -> None:
        """Close the files. What could not be written, which has raised an error, may be lost."""
        closing = [self._events.close]
        if self._hparams is not None:
            closing.append(partial(self._hparams.close, failed=failed))
        for close in closing:
            try:
                close()
            except OSError as error:
                logger.warning(f"a metrics file was not closed properly ({error})")


class _EventFile:
    """An event file. Summaries are of the classes of tensorboardX."""

    def __init__(self, folder: Path, *, suffix: str = "") -> None:
        from tensorboardX.event_file_writer import EventsWriter

        # Not SummaryWriter: its thread writes at an unknown later time, and a full disk ends it.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=suffix)

    def write(self, summaries: Sequence[Any], *, step: int) -> None:
        """Write summaries and flush the file. Raises OSError."""
        from tensorboardX.proto.event_pb2 import Event

        for summary in summaries:
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Raises OSError."""
        self._writer.close()


class _HParams:
    """The settings of a run and the scores of its last evaluation, for the HParams plugin.

    A resumed run writes them again, since settings may have changed.
    """

    def __init__(self, folder: Path, settings: Settings, *, last: Mapping[str, float]) -> None:
        from tensorboardX.summary import hparams

        folder.mkdir(exist_ok=True)
        for path in folder.glob(EVENTS):
            path.unlink()
        # The first of the three summaries lists all settings and metrics. The plugin would read it of one run only, and
        # without it finds out itself in which settings the runs differ.
        _, start, self._end = hparams(hyper_parameters(settings), {})
        self._file = _EventFile(folder)
        self._file.write([start], step=0)
        self.write_scores(last, step=0)

    def write_scores(self, scalars: Mapping[str, float], *, step: int) -> None:
        scores = {
            f"hparam/{name.removeprefix('evaluator_step/')}": value
            for name, value in scalars.items()
            if name.startswith("evaluator_step/") and name.endswith("_mean")
        }
        self._file.write(_scalars(scores), step=step)

    def close(self, *, failed: bool) -> None:
        """Write whether an error has ended the run."""
        if failed:
            self._end = _failure()
        try:
            self._file.write([self._end], step=0)
        finally:
            self._file.close()


def hyper_parameters(settings: Settings) -> dict[str, str | bool | float]:
    """All settings by ``group.key``. Lists are separated by commas."""
    return {
        f"{group}.{key}": ",".join(value) if isinstance(value, list) else value
        for group, values in settings.model_dump().items()
        for key, value in values.items()
        if f"{group}.{key}" not in LEFT_OUT
    }


def _scalars(scalars: Mapping[str, float]) -> list[Any]:
    from tensorboardX.summary import scalar

    return [scalar(name, float(value)) for name, value in scalars.items()]


def _as_markdown(text: str) -> str:
    """A block of code: the plugin shows text as Markdown, and the game's text is to be shown as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _failure() -> Any:
    """The summary that marks a run as failed."""
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    end = HParamsPluginData(session_end_info=SessionEndInfo(status=Status.Value("STATUS_FAILURE")))
    data = SummaryMetadata.PluginData(plugin_name="hparams", content=end.SerializeToString())
    metadata = SummaryMetadata(plugin_data=data)
    return Summary(value=[Summary.Value(tag="_hparams_/session_end_info", metadata=metadata)])
