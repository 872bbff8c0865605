"""Self-attention with a relative-position table; the arithmetic is one call with interchangeable backends."""

from __future__ import annotations

from torch import Tensor, nn

from foundation.models.position import RelativePositionTable
from kernels.rpe_attention import rpe_attention_packed
from kernels.rpe_attention.layout import Layout
from kernels.rpe_attention.reference import attention_probabilities


class Attention(nn.Module):
    """Multi-head self-attention over [B, L, dim]: `prefix` tokens, then patches in raster order of `grid`.

    Without `relative` positions there is no table, and of `grid` only the number of patches matters.
    """

    def __init__(self, dim: int, heads: int, backend: str = "auto", relative: bool = True, prefix: int = 1) -> None:
        super().__init__()
        self.heads, self.head_dim, self.backend, self.prefix = heads, dim // heads, backend, prefix
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpe = RelativePositionTable(self.head_dim, prefix) if relative else None
        self.proj = nn.Linear(dim, dim)

    def _packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads, [B, L, 3, heads, head_dim], as the projection leaves them."""
        return self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim)

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
