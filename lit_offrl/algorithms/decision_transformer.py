"""Decision Transformer (Chen et al., 2021, arXiv 2106.01345), as in CORL (Tarasov et al., 2022, arXiv 2210.07105).

What CORL's code decides, and we with it; in parentheses what the paper's authors do:

1. Segments are padded on the right, where the causal attention does not see the padding (on the left).
2. The squared error is a mean over all entries of the batch, padding included (over the steps of the data alone).
3. GELU (ReLU). The attention's projection to queries, keys and values begins by Xavier's rule, the other weights normal
   with deviation 0.02.
4. A learning rate of 8e-4 with batches of 4,096 segments in locomotion; the default here is the authors' 1e-4, for
   batches of 64.

Ours: padding repeats the last step of the episode. An episode at the end of the data that is not finished is kept; its
returns-to-go end with it. Timesteps beyond `max_episode_steps` share an embedding. Without a `target_return` the policy
asks for the best return of the data.

Returns are sums of the environment's own rewards, so the data need `data.reward raw`. The paper normalizes observations
(`data.normalize_observations true`), and keeps the last step of episodes that ran into the time limit
(`data.d4rl_compat false`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lit_offrl.algorithms.base import Info, Memory, OfflineAlgorithm, OptimizerSpec
from lit_offrl.batch import Batch
from lit_offrl.errors import UserError, require
from lit_offrl.networks.transformer import DropoutMasks, TrajectoryTransformer
from lit_offrl.ranges import Count, Finite, NonNegative, Positive, ProperFraction, Range, Steps, Width

CLIP_NORM = 0.25


class DecisionTransformer(OfflineAlgorithm):
    """A transformer that predicts the actions of a segment of K steps from the returns that follow them.

        R_t = r_t + r_(t+1) + ... to the end of the episode, undiscounted
        L   = E [ sum_t m_t |pi(R_(<=t), s_(<=t), a_(<t)) - a_t|^2 / (K dim a) ]

    m is 1 for the steps of the episode and 0 for padding. To act, the policy is given the return that it should reach,
    R_0, and the last K steps of its own history, where R_(t+1) = R_t - r_t with the rewards that it received.

    Args:
        observation_dim: Width of an observation (set from the dataset).
        action_dim: Width of an action (set from the dataset).
        context: Steps K that the transformer sees.
        embedding_dim: Width of a token; a multiple of `heads`.
        layers: Number of transformer blocks.
        heads: Heads of each attention.
        dropout: Share of the tokens' values, attention weights and blocks' outputs that is dropped in training.
        target_return: Return to ask for when acting, a sum of the environment's own rewards; null for the highest
            return of an episode of the training data.
        reward_scale: Factor of the returns that the transformer sees.
        max_episode_steps: Timesteps with an embedding of their own.
        learning_rate: Step size.
        weight_decay: Decoupled weight decay.
        warmup: Gradient steps over which the step size grows.
        **common: `pretrained` and `seed`, see `OfflineAlgorithm`.
    """

    has_memory = True
    best_return: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        context: Annotated[int, Range(2, 2**16)] = 20,
        embedding_dim: Width = 128,
        layers: Count = 3,
        heads: Count = 1,
        dropout: ProperFraction = 0.1,
        target_return: Finite | None = None,
        reward_scale: Positive = 0.001,
        max_episode_steps: Count = 1000,
        learning_rate: Positive = 1e-4,
        weight_decay: NonNegative = 1e-4,
        warmup: Steps = 10_000,
        **common: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, 0, **common)
        option = "model.init_args.heads"
        require(embedding_dim % heads == 0, option, f"a divisor of embedding_dim, {embedding_dim}", heads)
        self.context = self.segment_length = context
        self.embedding_dim, self.layers, self.heads = embedding_dim, layers, heads
        self.dropout = dropout
        self.target_return = target_return
        self.reward_scale = reward_scale
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.policy = TrajectoryTransformer(
            observation_dim, action_dim, embedding_dim, layers, heads, max_episode_steps
        )
        self.register_buffer("best_return", torch.zeros(()))

    def optimizer_specs(self) -> dict[str, OptimizerSpec]:
        """One Adam with weight decay."""
        spec = OptimizerSpec(
            (self.policy,),
            self.learning_rate,
            clip_norm=CLIP_NORM,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
        )
        return {"policy": spec}

    def on_train_start(self) -> None:
        """Find the highest return of the data of training.

        Raises:
            UserError: The rewards of the data are not the environment's own.
        """
        super().on_train_start()
        trainer: Any = self.trainer
        reward = getattr(getattr(trainer, "datamodule", None), "reward", "raw")
        if reward != "raw":
            raise UserError(
                f"data.reward: must be raw, not {reward}: the policy subtracts the rewards that it receives from the "
                "return that it should reach"
            )
        episodes = trainer.train_dataloader.episodes
        self.best_return.copy_(episodes.returns_to_go[episodes.timesteps == 0].max())

    # ---------------------------------------------------------------- training

    def dropout_masks(self, rows: int, steps: int) -> DropoutMasks | None:
        """Draw the masks of a forward pass; None where nothing is dropped."""
        tokens, values, heads = 3 * steps, 1 + 2 * self.layers, self.heads
        of_values = self.noise.dropout_masks(self.dropout, rows, values, tokens * self.embedding_dim)
        of_attention = self.noise.dropout_masks(self.dropout, rows, self.layers, heads * tokens * tokens)
        if of_values is None or of_attention is None:
            return None
        return DropoutMasks(
            of_values.view(values, rows, tokens, self.embedding_dim),
            of_attention.view(self.layers, rows, heads, tokens, tokens),
        )

    def predict(
        self,
        returns_to_go: Tensor,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        masks: DropoutMasks | None = None,
    ) -> Tensor:
        """Return the action of each step of segments, `[batch, steps, action_dim]`; returns are not scaled yet."""
        scaled = self.reward_scale * returns_to_go
        prediction: Tensor = self.policy(scaled, observations, actions, timesteps, masks)
        return self.units.limit * prediction

    def policy_loss(self, batch: Batch) -> Tensor:
        """Regression of the actions of the data; a mean over all entries, with 0 for padding."""
        assert batch.mask is not None
        assert batch.returns_to_go is not None
        assert batch.timesteps is not None
        masks = self.dropout_masks(*batch.mask.shape)
        prediction = self.predict(batch.returns_to_go, batch.observations, batch.actions, batch.timesteps, masks)
        return (batch.mask[..., None] * (prediction - batch.actions).square()).mean()

    def validation_losses(self, batch: Batch) -> Info:
        """The same loss."""
        return {"policy_loss": self.policy_loss(batch)}

    def update(self, batch: Batch) -> Info:
        """Step the transformer."""
        loss = self.policy_loss(batch)
        self.minimize("policy", loss)
        return {"policy_loss": loss.detach()}

    # ---------------------------------------------------------------- acting

    def remember(self, memory: Memory, observation: Tensor) -> None:
        """Add a step, whose action is still to come, to the history of an episode; keep the last `context` steps.

        The history is `returns_to_go` `[steps]`, `observations`, `actions` and `timesteps`, as `predict` takes them.

        Raises:
            UserError: The reward of the step before is missing.
        """
        if "timesteps" in memory:
            if "reward" not in memory:
                raise UserError("act: set memory['reward'] to the reward of the last step before the next action")
            return_to_go = memory["returns_to_go"][-1:] - memory.pop("reward")
            timestep = memory["timesteps"][-1:] + 1
        else:
            target = self.best_return if self.target_return is None else self.target_return
            return_to_go = target * observation.new_ones(1)
            timestep = torch.zeros(1, dtype=torch.int64, device=observation.device)
        step = {
            "returns_to_go": return_to_go,
            "observations": observation[None],
            "actions": observation.new_zeros(1, self.action_dim),
            "timesteps": timestep,
        }
        for name, value in step.items():
            memory[name] = torch.cat([memory[name], value])[-self.context :] if name in memory else value

    def sample_actions(
        self, observations: Tensor, generator: torch.Generator | None, memories: Sequence[Memory] = ()
    ) -> Tensor:
        """Return the prediction for the last step of each history; histories are padded on the right."""
        memories = memories or [{} for _ in observations]
        for memory, observation in zip(memories, observations, strict=True):
            self.remember(memory, observation)
        returns_to_go, seen, chosen, timesteps = (
            nn.utils.rnn.pad_sequence([memory[name] for memory in memories], batch_first=True)
            for name in ("returns_to_go", "observations", "actions", "timesteps")
        )
        last = torch.tensor([len(memory["timesteps"]) - 1 for memory in memories], device=observations.device)
        predictions = self.predict(returns_to_go, seen, chosen, timesteps)
        actions = predictions[torch.arange(len(last), device=last.device), last]
        for memory, action in zip(memories, actions, strict=True):
            memory["actions"][-1] = action
        return actions
