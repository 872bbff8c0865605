"""Self-attention with a relative-position table; the arithmetic is one call with interchangeable backends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foundation.models.position import RelativePositionTable
from kernels.rpe_attention import rpe_attention_packed
from kernels.rpe_attention.layout import Layout
from kernels.rpe_attention.reference import attention_probabilities


class Attention(nn.Module):
    """Multi-head self-attention over [B, L, dim]: `prefix` tokens, then patches in raster order of `grid`.

    Without `relative` positions there is no table, and of `grid` only the number of patches matters. With `qk_norm`
    queries and keys are normalised per head; the table multiplies the normalised query, so that its logits, too, are
    bounded whatever the projection grows to.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        relative: bool = True,
        prefix: int = 1,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.backend, self.prefix = heads, dim // heads, backend, prefix
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpe = RelativePositionTable(self.head_dim, prefix) if relative else None
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else None

    def _packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads, [B, L, 3, heads, head_dim], as the projection leaves them."""
        packed = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            return packed
        q, k, v = packed.unbind(2)
        return torch.stack((self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v), 2)

    def _table(self) -> Tensor | None:
        return None if self.rpe is None else self.rpe()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, prefix + h·w, dim] → the same shape."""
        # The position term takes the unscaled query (rpe_scale 1), as in the published SAR-JEPA and LoMaR.
        out = rpe_attention_packed(
            self._packed(x), self._table(), grid, self.prefix, rpe_scale=1.0, backend=self.backend
        )
        return self.proj(out.reshape(x.shape))

    def probabilities(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The attention maps themselves: [B, heads, L, L]; for figures, always by the definition."""
        q, k, _ = self._packed(x).permute(2, 0, 3, 1, 4).unbind(0)
        return attention_probabilities(q, k, self._table(), Layout(grid, self.prefix), self.head_dim**-0.5, 1.0)
