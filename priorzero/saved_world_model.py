"""Loading the world model of a trained agent alone, without its LLM, its games and its training state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from priorzero.play.action_vocabulary import ActionVocabulary
from priorzero.play.text_encoder import TextEncoder
from priorzero.run_state import load_world_model_state
from priorzero.runs.exported import read_world_model
from priorzero.runs.saved import find_agent
from priorzero.search.base import Root
from priorzero.settings import Settings
from priorzero.world_model.inference import WorldModelInference
from priorzero.world_model.unizero import UniZeroLearner


@dataclass(frozen=True)
class WorldModel:
    """A trained world model.

    Attributes:
        settings: the settings of its run.
        network: LightZero's ``UniZeroModel``, in eval mode.
        inference: the network as the search uses it.
        vocabulary: the index of each action text.
        feature_size: the feature size F.
    """

    settings: Settings
    network: Any
    inference: WorldModelInference
    vocabulary: ActionVocabulary
    feature_size: int

    def make_encoder(self) -> TextEncoder:
        """Load the text encoder that the world model was trained with; ``features`` converts states to ``[n, F]``.

        Raises:
            UserError: it cannot be found or loaded.
        """
        device = next(self.network.parameters()).device
        return TextEncoder(self.settings.encoder.path, device=device, with_look=self.settings.env.look_and_inventory)

    @torch.no_grad()
    def predict(self, features: np.ndarray, actions: Sequence[int] = ()) -> tuple[np.ndarray, float]:
        """Predictions for the last of the latest states of an episode.

        Args:
            features: of the latest states, oldest first, ``[n, F]``, with ``n <= world_model.context_length / 2``.
            actions: indices of the actions between them, ``[n - 1]``.

        Returns:
            Policy logits of all actions of the vocabulary, ``[A]``, and the value: the discounted points to come, times
            ``train.reward_scale``.
        """
        taken = np.array(actions, dtype=np.int64)
        contexts = self.inference.root_contexts(
            [Root(features, taken, legal_actions=np.arange(self.vocabulary.capacity))]
        )
        policy_logits, values = self.inference.predict(contexts)
        return policy_logits[0], float(values[0])


@torch.no_grad()
def load_world_model(where: str | Path, *, device: str = "cpu") -> WorldModel:
    """Load the world model of an exported agent, a checkpoint or a run (its newest checkpoint).

    Args:
        where: the folder.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: the folder contains no trained agent, or it is damaged.
    """
    checkpoint = find_agent(where)
    state = read_world_model(checkpoint.folder)
    feature_size = next(len(mean) for name, mean in state.items() if name.endswith("encoder.feature_mean"))
    learner = UniZeroLearner(checkpoint.settings, feature_size=feature_size, device=device)
    vocabulary = ActionVocabulary(checkpoint.settings.env.num_actions)
    load_world_model_state(checkpoint.folder, policy=learner, indexer=vocabulary)
    learner.network.eval()
    return WorldModel(checkpoint.settings, learner.network, learner.inference, vocabulary, feature_size)
