"""The networks of energy-guided diffusion: a noise network, and an energy whose gradient is written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_offrl import native
from lit_offrl.networks.at_observations import AtObservations
from lit_offrl.networks.bottleneck import full_precision, silu_with_pullback
from lit_offrl.networks.embeddings import FourierEmbedding
from lit_offrl.networks.mlp import affine, mlp, parameters_of


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
        self.fused = True  # where there is a kernel for it and no gradient to take

    def after_features(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the output, `[..., width_out]`, as a function of x, `[..., width_in]`, and of map(features)."""
        first, second = affine(self.first), affine(self.second)
        skip = affine(self.skip) if isinstance(self.skip, nn.Linear) else self.skip
        parameters = parameters_of((self.first, self.second, self.skip))

        def forward(x: Tensor, shift: Tensor) -> Tensor:
            if self.fused and not torch.is_grad_enabled() and native.take(x):
                output: Tensor = torch.ops.lit_offrl_native.feature_block(x, shift, parameters)
                return output
            return F.silu(second(F.silu(first(x)) + shift)) + skip(x)

        return forward


class NoiseNetwork(nn.Module):
    """epsilon(a_t | s, t) by residual blocks in the shape of a U, as QGPO's authors built it; AEPO has the same widths.

    Blocks get narrower, h, h / 2 and h / 4, and wider again, each on the way up with the output of the one of its
    width on the way down beside it. Time and observation enter every block through 128 features, and nowhere else.
    QGPO's network divides its output by sigma_t, to be the score, and its loss multiplies the score by sigma_t: that is
    the noise, up to the sign of the head, and the noise it is here.

    Args:
        action_dim: Width of an action.
        observation_dim: Width of an observation; 0 for a network that does not see it (2-D bandits).
        hidden_dim: Width h of the widest blocks, a multiple of 4.
    """

    EMBEDDING, FEATURES = 32, 128  # widths: of time and of observation by themselves, and of both together

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

    def at(self, observations: Tensor) -> AtObservations:
        """Return epsilon as a function of actions and times at fixed observations, shapes as in `forward`.

        What depends on the observations alone is computed once.
        """
        state = () if self.state is None else (self.state(observations),)
        blocks = [block for block in (*self.down, self.middle, *self.up) if isinstance(block, FeatureBlock)]
        maps, middle, head = [block.after_features() for block in blocks], len(self.down), affine(self.head)

        def prepare(time: Tensor) -> tuple[Tensor, ...]:
            features = F.silu(self.features(self.time(time), *state))
            return tuple(block.features(features) for block in blocks)

        def predict(actions: Tensor, *shifts: Tensor) -> Tensor:
            hidden = actions
            down: list[Tensor] = []
            for i, (block, shift) in enumerate(zip(maps, shifts, strict=True)):
                beside = torch.cat([down.pop(), hidden], dim=-1) if i > middle else hidden
                hidden = block(beside, shift)
                if i < middle:
                    down.append(hidden)
            return head(torch.cat([down.pop(), hidden], dim=-1))

        return AtObservations(observations, prepare, predict)

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return epsilon, `[..., action_dim]`, at `[..., action_dim]`, `[...]` and `[..., observation_dim]`.

        Those of time and observation broadcast against those of the actions: `[batch, 1]` and `[batch, 1, ...]`
        serve the many actions `[batch, samples, ...]` of a state, and are embedded once.
        """
        return self.at(observations)(actions, time)


class EnergyNetwork(nn.Module):
    """f(a_t | s, t), the log of an expectation over clean actions, whose gradient guides a diffusion (QGPO, AEPO).

    The gradient is written out rather than left to autograd: sampling builds no graph. Both are computed in full
    precision, whatever autocast says: f matters in differences.

    Args:
        action_dim: Width of an action.
        observation_dim: Width of an observation; 0 for a network that does not see it (2-D bandits).
        hidden_dim: Width of the hidden layers.
        layers: Number of hidden layers, each followed by SiLU.
    """

    EMBEDDING = 32  # width of the time's features

    def __init__(self, action_dim: int, observation_dim: int, hidden_dim: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.widths = (action_dim, self.EMBEDDING, observation_dim)
        self.time = nn.Sequential(FourierEmbedding(), nn.Linear(FourierEmbedding.WIDTH, self.EMBEDDING))
        self.layers = mlp((sum(self.widths), *(hidden_dim,) * layers, 1), nn.SiLU)

    def forward(self, actions: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        """Return f, `[...]`, at `[..., action_dim]`, `[...]` and `[..., observation_dim]`, which broadcast."""
        with full_precision(actions):
            seen = (observations,) if self.widths[2] else ()
            value: Tensor = self.layers(actions, self.time(time), *seen).squeeze(-1)
            return value

    def gradient(self, observations: Tensor) -> AtObservations:
        """Return df/da as a function of actions and times at fixed observations, shapes as in `forward`.

        What depends on the observations alone is computed once.
        """
        first, *inner, last = (layer for layer in self.layers if isinstance(layer, nn.Linear))
        onward, weights, head = [affine(layer) for layer in inner], [layer.weight for layer in inner], last.weight[0]
        with full_precision(observations):
            action_map, time_map, state_map = torch.split(first.weight, list(self.widths), dim=1)
            shift = F.linear(observations, state_map, first.bias) if self.widths[2] else first.bias

        def prepare(time: Tensor) -> tuple[Tensor]:
            with full_precision(time):
                return (shift + F.linear(self.time(time), time_map),)

        def gradient(actions: Tensor, entrance: Tensor) -> Tensor:
            with full_precision(actions):
                hidden = F.linear(actions, action_map) + entrance
                pullbacks = []
                for layer in onward:
                    value, pullback = silu_with_pullback(hidden)
                    pullbacks.append(pullback)
                    hidden = layer(value)
                _, pullback = silu_with_pullback(hidden)
                result = pullback(head.expand_as(hidden))
                for weight, pullback in zip(reversed(weights), reversed(pullbacks), strict=True):
                    result = pullback(result @ weight)
                return result @ action_map

        return AtObservations(observations, prepare, gradient)
