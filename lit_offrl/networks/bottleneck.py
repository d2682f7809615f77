"""The scalar network of a bottleneck diffusion model (EDA)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.networks.embeddings import FourierEmbedding
from lit_offrl.networks.gradients import action_gradient, full_precision
from lit_offrl.networks.mlp import ResidualBlock, concatenate


class BottleneckNetwork(nn.Module):
    """f(a_t | s, t), whose gradient in a_t is a diffusion model's score (EDA, Eq. 9), as EDA's authors built it.

    Linear maps of action, time features and observation are concatenated and mixed by a linear layer. Residual blocks
    and a SiLU follow, then a head whose `action_dim` outputs are summed. One output would represent the same
    functions, but Adam moves each output by the learning rate, so that a single one would learn `action_dim` times
    more slowly. The head has no bias: a constant has no gradient.

    Args:
        action_dim: Width of an action.
        observation_dim: Width of an observation; 0 for a network that does not see it (2-D bandits).
        hidden_dim: Width of the blocks. An eighth is for the time and, where there is an observation, three eighths
            are for it; the action has the rest.
        blocks: Number of residual blocks.
    """

    def __init__(self, action_dim: int, observation_dim: int, hidden_dim: int = 256, blocks: int = 3) -> None:
        super().__init__()
        time_dim = hidden_dim // 8
        state_dim = 3 * hidden_dim // 8 if observation_dim else 0
        self.action = nn.Linear(action_dim, hidden_dim - time_dim - state_dim)
        self.time = nn.Sequential(
            FourierEmbedding(), nn.Linear(FourierEmbedding.WIDTH, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.state = nn.Linear(observation_dim, state_dim) if observation_dim else None
        self.mix = nn.Linear(hidden_dim, hidden_dim)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_dim) for _ in range(blocks))
        self.head = nn.Linear(hidden_dim, action_dim, bias=False)

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return f, `[...]`, in full precision.

        Args:
            actions: a_t, `[..., action_dim]`.
            time: t, `[...]`; leading dimensions of all arguments broadcast.
            observations: `[..., observation_dim]`.
            masks: Dropout masks, one for each block, `[blocks, ..., hidden_dim]`; None for no dropout.
        """
        with full_precision(actions):
            inputs = [self.action(actions), self.time(time)]
            if self.state is not None:
                inputs.append(self.state(observations))
            hidden = self.mix(concatenate(*inputs))
            for i, block in enumerate(self.blocks):
                hidden = block(hidden, None if masks is None else masks[i])
            value: Tensor = self.head(F.silu(hidden)).sum(-1)
        return value

    def gradient(self, actions: Tensor, time: Tensor, observations: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return df/da, `[..., action_dim]`, with the same dropout in f and in its gradient; see `forward`."""
        return action_gradient(partial(self, masks=masks), actions, time, observations)
