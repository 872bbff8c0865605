"""The size table of the ViT family, and what a size costs: parameters and floating-point operations as formulas."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from foundation.models.layers import PLAIN, Options
from kernels.rpe_attention import choose
from kernels.rpe_attention.buckets import num_buckets
from kernels.rpe_attention.layout import Layout, Problem

if TYPE_CHECKING:
    from foundation.config import Config


class Row(NamedTuple):
    """Width, number of blocks and attention heads of an encoder; the MLP is that of `layers.Options.hidden`."""

    dim: int
    depth: int
    heads: int


FAMILY = {
    "nano": Row(96, 4, 3),  # for the demo and the tests
    "tiny": Row(192, 12, 3),
    "small": Row(384, 12, 6),
    "base": Row(768, 12, 12),
    "large": Row(1024, 24, 16),
    "huge": Row(1280, 32, 16),
    # g and G of Zhai et al. (arXiv 2106.04560), there with MLPs of 48/11 and 64/13 times the width; here 4 as in all
    # sizes, which makes their blocks 6 % and 13 % smaller.
    "giant": Row(1408, 40, 16),
    "gigantic": Row(1664, 48, 16),
    "3b": Row(2560, 36, 20),
    "7b": Row(4096, 40, 32),  # width and depth of DINOv3's 7B; a plain MLP of ratio 4 makes it 8.05 B
    "22b": Row(6144, 48, 48),  # arXiv 2302.05442
}


class Tokens(NamedTuple):
    """What a masked model makes of one image."""

    patches: int
    """embedded: the whole grid"""
    windows: int
    length: int
    """of one window, with the prefix; masked tokens are processed like all others, if not by the encoder"""
    masked: int
    """predicted, per window: the masked ones, or all where nothing is masked"""
    values: int
    """of one prediction"""
    target: int
    """values of the exact target of one prediction; more than predicted where a fusion is learnt"""
    fusion: int = 0
    """learnt weights of the target's maps"""
    visible: int | None = None
    """tokens of a window that pass the encoder, the prefix among them; None: all"""
    class_token: bool = True
    """in front of the patches of the encoder, and of the decoder"""
    registers: int = 0
    """in front of the patches of the encoder alone"""
    blocks: int = 0
    """target blocks of an image, each of which a predictor meets beside what is visible, and a teacher sees the whole
    image; 0: one decoder pass per window, no teacher"""

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches of a window in the encoder."""
        return self.class_token + self.registers

    @property
    def inside(self) -> int:
        """Patches of one window."""
        return self.length - self.prefix

    @property
    def encoded(self) -> int:
        """Tokens of a window in the encoder."""
        return self.length if self.visible is None else self.visible

    @property
    def taken(self) -> int:
        """Tokens of a window that the decoder takes from the encoder."""
        return self.encoded - self.registers

    @property
    def decoded(self) -> int:
        """Tokens of one pass of the decoder: all but the registers, or what is visible and one target block."""
        return self.taken + self.masked if self.blocks else self.length - self.registers

    @property
    def passes(self) -> int:
        """Passes of an image through the decoder, each with `masked` predictions."""
        return self.blocks or self.windows


def tokens(config: Config) -> Tokens:
    """The token counts of a configuration: its objective knows them."""
    # Looked up when asked for: objectives build models, and no configuration is valid without them.
    counts: Tokens = importlib.import_module("foundation.objectives.registry").build(config).tokens()
    return counts


def class_token(config: Config) -> bool:
    """Whether the encoder has one: its objective decides."""
    found: bool = importlib.import_module("foundation.objectives.registry").build(config).class_token
    return found


def attention_backends(config: Config, device: str) -> tuple[str, ...]:
    """The backends that train encoder and decoder, if any, on a type of device: `auto` is what it stands for there."""
    row, model, t = FAMILY[config.model.size], config.model, tokens(config)
    side, bias = math.isqrt(t.inside), "contextual" if relative(config) else "none"
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    seen = (side, side) if t.visible is None else (1, t.visible - t.prefix)
    parts = [(row.dim, row.heads, Layout(seen, t.prefix))]
    if model.decoder.depth:
        place = Layout((1, t.decoded), 0) if t.blocks else Layout((side, side), int(t.class_token))
        parts.append((model.decoder.width, model.decoder.heads, place))
    problems = (Problem(device, dtype, h, dim // h, layout, bias=bias, trains=True) for dim, h, layout in parts)
    return tuple(choose(model.attention, problem) for problem in problems)


class Rows(NamedTuple):
    """A parameter as engines cut it: rows (the first dimension) of so many elements each."""

    rows: int
    elements: int = 1


def size(shapes: Iterable[Rows]) -> int:
    """Elements of all of them."""
    return sum(rows * elements for rows, elements in shapes)


class Shapes(NamedTuple):
    """The parameters of a model: of one encoder block, of one decoder block, and all that lie in no block.

    `frozen` are those of a teacher that lie in no block; it has the blocks of the encoder once more.
    """

    block: list[Rows]
    decoder_block: list[Rows]
    root: list[Rows]
    depth: int
    decoder_depth: int
    frozen: list[Rows] = []  # noqa: RUF012  # never changed

    @property
    def trained(self) -> list[Rows]:
        """All that have gradients and moments."""
        return self.root + self.depth * self.block + self.decoder_depth * self.decoder_block

    @property
    def teacher(self) -> list[Rows]:
        """All that only follow."""
        return self.frozen + self.depth * self.block if self.frozen else []

    @property
    def every(self) -> list[Rows]:
        """All of the model."""
        return self.trained + self.teacher


def linear(inputs: int, outputs: int) -> list[Rows]:
    """A matrix of so many rows, and its bias."""
    return [Rows(outputs, inputs), Rows(outputs)]


def options(config: Config) -> Options:
    """What the encoder's blocks have beyond the plain ones."""
    model = config.model
    return Options(model.layer_scale, model.mlp, model.qk_norm)


def relative(config: Config) -> bool:
    """Whether blocks have a table of relative positions."""
    return config.model.positions == "relative"


def block_shapes(dim: int, heads: int, relative: bool = True, prefix: int = 1, options: Options = PLAIN) -> list[Rows]:
    """One block: two norms, four projections of attention (three in one), an MLP of ratio 4, the table of all heads.

    12 dim² + 13 dim + dim / heads · buckets parameters, without `relative` positions no buckets. Of swiglu the MLP has
    3 dim · hidden + 2 hidden + dim instead of 8 dim² + 5 dim; layer scales are 2 dim, norms of q and k 4 dim / heads.
    """
    hidden, gates = options.hidden(dim), 2 if options.mlp == "swiglu" else 1
    extra = [] if options.layer_scale is None else 2 * [Rows(dim)]
    extra += 4 * [Rows(dim // heads)] if options.qk_norm else []
    table = [Rows(1, dim // heads * num_buckets(cls_tokens=prefix))] if relative else []
    attention = [*linear(dim, 3 * dim), *table, *linear(dim, dim)]
    return [*4 * [Rows(dim)], *attention, *linear(dim, gates * hidden), *linear(hidden, dim), *extra]


def shapes(config: Config) -> Shapes:
    """The parameters of the model that a configuration builds, decoder included."""
    row, model, decoder, t = FAMILY[config.model.size], config.model, config.model.decoder, tokens(config)
    encoder = linear(model.patch**2 * model.channels, row.dim)
    encoder += [Rows(1, tokens * row.dim) for tokens in (t.class_token, t.registers) if tokens]
    encoder += [Rows(1, t.patches * row.dim)] if model.positions == "learned" else []
    encoder += 2 * [Rows(row.dim)]  # the final norm
    frozen = encoder if t.blocks else []
    root = [*encoder, Rows(1, row.dim if t.visible is None else decoder.width)]  # the mask token, where it enters
    root += [Rows(t.fusion)] if t.fusion else []
    block = block_shapes(row.dim, row.heads, relative(config), t.prefix, options(config))
    if not decoder.depth:
        return Shapes(block, [], root + linear(row.dim, t.values), row.depth, 0)
    root += [*linear(row.dim, decoder.width), *2 * [Rows(decoder.width)], *linear(decoder.width, t.values)]
    narrow = block_shapes(decoder.width, decoder.heads, relative(config), int(t.class_token))
    return Shapes(block, narrow, root, row.depth, decoder.depth, frozen)


class Parameters(NamedTuple):
    """Parameters by part; `block` is one encoder block, `root` all that lies in no block."""

    total: int
    block: int
    decoder_block: int
    root: int
    teacher: int = 0
    """of the total: without gradients"""


def parameters(config: Config) -> Parameters:
    """Exact parameter counts of the model that a configuration builds, decoder included."""
    s = shapes(config)
    return Parameters(size(s.every), size(s.block), size(s.decoder_block), size(s.root + s.frozen), size(s.teacher))


class Flops(NamedTuple):
    """Floating-point operations of one forward pass of one image, by part."""

    embed: int
    encoder: int
    decoder: int
    head: int
    """the projection into the decoder, where there is one, and the prediction of the masked tokens"""
    teacher: int = 0
    """of the whole image, without a backward pass"""

    @property
    def forward(self) -> int:
        """Of one forward pass."""
        return sum(self)

    @property
    def training(self) -> int:
        """Of forward and backward: three times the forward pass, as usual, but that of a teacher.

        The first projection needs no gradient of the image, so `embed` less is executed (below 0.2 %).
        """
        return 3 * self.forward - 2 * self.teacher


def block_flops(dim: int, length: int, relative: bool = True, prefix: int = 1, options: Options = PLAIN) -> int:
    """One block over one sequence of `length` tokens, `prefix` of them in front of the patches."""
    mlp = (6 if options.mlp == "swiglu" else 4) * dim * options.hidden(dim)
    return length * (8 * dim * dim + mlp + 4 * length * dim + 2 * num_buckets(cls_tokens=prefix) * dim * relative)


def flops(config: Config, counts: Tokens | None = None) -> Flops:
    """Operations of one image: 2 per multiply-add of every matrix product by the definition, as executed.

    `counts` replaces the token counts of the configuration, which are means where they differ between batches.

    All windows with all their tokens pass the decoder, and the encoder if it sees the masked ones; attention counts
    q·k, p·v and the product of the queries with the position table. Norms, softmax, GELU, gates, residuals and the
    target do not count (none of them is a matrix product), nor what a backend adds, such as the spread table of `dense`
    and `sdpa`.
    """
    row, model, decoder, t = FAMILY[config.model.size], config.model, config.model.decoder, counts or tokens(config)
    projection = 2 * t.windows * t.taken * row.dim * decoder.width if decoder.depth else 0
    width = decoder.width if decoder.depth else row.dim
    embed = 2 * t.patches * model.patch**2 * model.channels * row.dim
    whole = embed + row.depth * block_flops(row.dim, t.prefix + t.patches, relative(config), t.prefix, options(config))
    return Flops(
        embed=embed,
        encoder=row.depth * t.windows * block_flops(row.dim, t.encoded, relative(config), t.prefix, options(config)),
        decoder=decoder.depth * t.passes * block_flops(decoder.width, t.decoded, relative(config), t.class_token),
        head=projection + 2 * t.passes * t.masked * width * t.values,
        teacher=whole if t.blocks else 0,
    )
