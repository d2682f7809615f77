"""Transformers over the steps of an episode."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

INITIAL_STD = 0.02  # of GPT-2


class DropoutMasks(NamedTuple):
    """Masks of one forward pass, which drop values and scale up the others (`NoiseStream.dropout_masks`).

    Attributes:
        values: Of the embedded tokens, then of attention and MLP of each block, `[1 + 2 blocks, batch, tokens, width]`.
        attention: Of the attention weights of each block, `[blocks, batch, heads, tokens, tokens]`.
    """

    values: Tensor
    attention: Tensor


class CausalSelfAttention(nn.Module):
    """Attention of each token to itself and to the tokens before it.

    Args:
        width: Width of a token.
        heads: Number of heads, a divisor of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)  # to queries, keys and values
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape; `mask` `[batch, heads, tokens, tokens]` drops weights."""
        batch, length, width = tokens.shape
        projected = self.project(tokens).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = projected.permute(2, 0, 3, 1, 4).unbind(0)
        scores = queries @ keys.mT / math.sqrt(width // self.heads)
        is_later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        weights = scores.masked_fill(is_later, -math.inf).softmax(-1)
        if mask is not None:
            weights = weights * mask
        output: Tensor = self.output((weights @ values).transpose(1, 2).reshape(batch, length, width))
        return output


class TransformerBlock(nn.Module):
    """x + attention(LayerNorm(x)), and then the same with an MLP of four times the width, GELU.

    Args:
        width: Width of a token.
        heads: Number of heads of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, masks: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape.

        Args:
            tokens: The tokens.
            masks: Dropout of the attention weights `[batch, heads, tokens, tokens]`, of the attention's output and of
                the MLP's output, `[batch, tokens, width]` each.
        """
        of_weights, of_attention, of_mlp = masks or (None, None, None)
        attended: Tensor = self.attention(self.attention_norm(tokens), of_weights)
        tokens = tokens + (attended if of_attention is None else attended * of_attention)
        output: Tensor = self.mlp(self.mlp_norm(tokens))
        return tokens + (output if of_mlp is None else output * of_mlp)


class TrajectoryTransformer(nn.Module):
    """Predicts the action of each step from returns-to-go and observations up to this step and the actions before it.

    Each step is three tokens: return-to-go, observation, action. A learned embedding of the timestep, the same for the
    three, is added; there is no other code of the position.

    Args:
        observation_dim: Width of an observation.
        action_dim: Width of an action.
        width: Width of a token.
        blocks: Number of blocks.
        heads: Number of heads of each attention.
        timesteps: Number of timesteps that have an embedding of their own; later ones share the last.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, width: int, blocks: int, heads: int, timesteps: int
    ) -> None:
        super().__init__()
        self.embed_return = nn.Linear(1, width)
        self.embed_observation = nn.Linear(observation_dim, width)
        self.embed_action = nn.Linear(action_dim, width)
        self.embed_timestep = nn.Embedding(timesteps, width)
        self.token_norm, self.output_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, action_dim)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                nn.init.xavier_uniform_(module.project.weight)

    def forward(
        self,
        returns_to_go: Tensor,
        observations: Tensor,
        actions: Tensor,
        timesteps: Tensor,
        masks: DropoutMasks | None = None,
    ) -> Tensor:
        """Return the predicted action of each step, in [-1, 1], `[batch, steps, action_dim]`.

        Args:
            returns_to_go: `[batch, steps]`.
            observations: `[batch, steps, observation_dim]`.
            actions: `[batch, steps, action_dim]`.
            timesteps: The place of each step in its episode, int64 `[batch, steps]`.
            masks: Dropout; None for no dropout.
        """
        timesteps = timesteps.clamp(max=self.embed_timestep.num_embeddings - 1)
        embedded = torch.stack(
            [
                self.embed_return(returns_to_go[..., None]),
                self.embed_observation(observations),
                self.embed_action(actions),
            ],
            dim=2,
        )
        tokens = self.token_norm((embedded + self.embed_timestep(timesteps)[:, :, None]).flatten(1, 2))
        if masks is not None:
            tokens = tokens * masks.values[0]
        for i, block in enumerate(self.blocks):
            own = None if masks is None else (masks.attention[i], masks.values[1 + 2 * i], masks.values[2 + 2 * i])
            tokens = block(tokens, own)
        at_observations = self.output_norm(tokens)[:, 1::3]
        return torch.tanh(self.head(at_observations))
