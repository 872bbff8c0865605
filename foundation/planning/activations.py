"""Bytes that a micro-batch keeps for its backward pass, as formulas of the configuration.

They count what autograd keeps of this model, tensor by tensor, in the manner of Korthikanti et al. (arXiv 2205.05198,
section 4); tests compare them with the bytes a CPU run really keeps. What only CUDA does (autocast's fp32 norms and
softmax, the padded bias) follows PyTorch's rules and is not measured.
"""

from __future__ import annotations

from typing import NamedTuple

from foundation.config import Config
from foundation.models.families import FAMILY, attention_backends, options, relative, tokens
from foundation.models.layers import PLAIN, Options
from kernels.rpe_attention.buckets import num_buckets


class Widths(NamedTuple):
    """Bytes of an element under a precision and device."""

    element: int
    norm: int
    """of the input that a LayerNorm keeps: CUDA's autocast gives it an fp32 copy"""
    softmax: int
    """of the map that a softmax keeps"""


def widths(precision: str, device: str, autocast: bool = True) -> Widths:
    """fp32: 4 throughout; bf16: 2, but CUDA's autocast (single, ddp) computes norms and softmax in fp32."""
    if precision == "fp32":
        return Widths(4, 4, 4)
    return Widths(2, 4, 4) if device == "cuda" and autocast else Widths(2, 2, 2)


class Shape(NamedTuple):
    """One block at work: `sequences` of `length` tokens."""

    dim: int
    heads: int
    length: int
    sequences: int
    relative: bool = True
    """with a table of relative positions"""
    options: Options = PLAIN

    @property
    def values(self) -> int:
        """Elements of one activation of the width of the model."""
        return self.sequences * self.length * self.dim

    def map(self, columns: int | None = None) -> int:
        """Elements of a map with so many columns (default: the length) per token and head."""
        return self.sequences * self.heads * self.length * (self.length if columns is None else columns)


def attention_bytes(s: Shape, w: Widths, backend: str, device: str) -> int:
    """What the attention backend keeps, beside its output, which the projection after it keeps.

    reference: copies of q (twice), k, v; the product of queries and table, which its gather keeps; the map of the
    softmax. dense: q (twice), k, v; the map; the table spread over all pairs. Where softmax widens the map, also the
    narrow one that multiplies v. sdpa on CUDA (memory-efficient kernel): packed q, k, v, the query of the bias, the
    bias padded to 8 columns, one fp32 number per row, and the spread table; on a CPU it runs as `dense`, in fp32.
    xformers: as sdpa on CUDA. flex: packed q, k, v, copies of them, the products of queries and table. The fused ones
    (triton, cuda): packed q, k, v and one number per row, no map. Without relative positions reference and dense keep q
    once, and sdpa, xformers and flash are fused ones.
    """
    e, rows = w.element, s.map(1)
    spread = s.length**2 * s.dim // s.heads * e
    narrow = s.map() * e if w.softmax != e else 0
    if not s.relative:
        if backend in ("reference", "dense"):
            return 3 * s.values * e + s.map() * w.softmax + narrow
        return (6 if backend == "flex" else 3) * s.values * e + 4 * rows
    if backend == "reference":
        return 4 * s.values * e + s.map(num_buckets()) * e + s.map() * w.softmax + narrow
    if backend == "dense":
        return 4 * s.values * e + s.map() * w.softmax + narrow + spread
    if backend == "sdpa" and device == "cpu":
        return s.values * (e + 12) + 4 * s.map() + spread
    if backend in ("sdpa", "xformers"):
        return 4 * s.values * e + s.map(-(-s.length // 8) * 8) * e + 4 * rows + spread
    if backend == "flex":
        return 6 * s.values * e + s.map(num_buckets()) * e + 4 * rows
    return 3 * s.values * e + 4 * rows


def block_bytes(s: Shape, w: Widths, backend: str, device: str) -> int:
    """One block without checkpointing, V = sequences · length · dim elements of width e:

    V · (2 · norm + 11 e) + attention + 16 bytes per token: the inputs of both norms; the inputs of qkv, of the
    projection and of the MLP (3 e); what GELU takes and gives (8 e); mean and deviation of two norms. Of swiglu 4
    hidden instead of 8 dim: both halves, the gate behind SiLU, the product. Layer scales keep what they multiply (2 e).
    """
    tokens, mlp = s.values // s.dim, 8 * s.dim if s.options.mlp == "gelu" else 4 * s.options.hidden(s.dim)
    scales = 0 if s.options.layer_scale is None else 2
    kept = s.values * (2 * w.norm + (3 + scales) * w.element) + tokens * (mlp * w.element + 16)
    return kept + attention_bytes(s, w, backend, device) + norm_bytes(s, w)


def norm_bytes(s: Shape, w: Widths) -> int:
    """What norms of queries and keys keep: their inputs, views of the packed projection or (CUDA's autocast) copies in
    fp32, and mean and deviation per head."""
    if not s.options.qk_norm:
        return 0
    return (3 * s.values * w.element if w.norm == w.element else 2 * s.values * w.norm) + 16 * s.map(1)


def selective_bytes(s: Shape, w: Widths, backend: str, device: str) -> int:
    """One block of which the input and the results of its products are kept: 11 e V and the products of attention.

    The products: qkv (3), attention times v, projection, the MLP (4 + 1, of swiglu 2 hidden / dim + 1), and with the
    input 11; the bias or table product and the logits of the backends that make them.
    """
    e, pairs = w.element, s.map()
    inner = 4 * s.dim if s.options.mlp == "gelu" else 2 * s.options.hidden(s.dim)
    products = s.values // s.dim * (7 * s.dim + inner)
    if not s.relative:
        return (products + (pairs if backend in ("reference", "dense") else 0)) * e
    spread = s.length**2 * s.dim // s.heads * e
    logits = {"reference": s.map(num_buckets()) + pairs, "dense": 2 * pairs, "sdpa": pairs, "xformers": pairs}.get(
        backend, 0
    )
    logits = s.map(num_buckets()) if backend == "flex" else logits
    if backend == "sdpa" and device == "cpu":
        logits = 2 * pairs
    return products * e + logits * e + (spread if backend in ("dense", "sdpa", "xformers") else 0)


def position_bytes(s: Shape, w: Widths, backend: str, device: str, selective: bool = False) -> int:
    """What of a block is there for the relative positions alone: the bias, what it is made of, and a copy of q for it.

    `selective`: of what selective checkpointing keeps, only results of products.
    """
    if not s.relative:
        return 0
    e, query = w.element, 0 if selective else s.values * w.element
    spread = s.length**2 * s.dim // s.heads * e
    on_cpu = backend == "sdpa" and device == "cpu"
    if backend in ("reference", "flex"):
        return query + s.map(num_buckets()) * e
    if backend == "dense" or on_cpu:
        return query + spread + (s.map() * e if selective else 0)
    if backend in ("sdpa", "xformers"):
        return query + spread + s.map(s.length if selective else -(-s.length // 8) * 8) * e
    return 0


class Activations(NamedTuple):
    """Bytes that autograd keeps of one micro-batch: all blocks, the rest, the block being recomputed.

    `positions` is what of them relative positions take.
    """

    blocks: int
    rest: int
    recomputed: int
    positions: int

    @property
    def total(self) -> int:
        """The most that is alive at once."""
        return self.blocks + self.rest + self.recomputed


def activations(config: Config, micro_batch: int, device: str = "cuda", autocast: bool = True) -> Activations:
    """Activations of a micro-batch of images under the configuration's checkpointing.

    none: every block keeps `block_bytes`. full: every block keeps its input; in the backward pass one block at a time
    is computed again and then keeps all. selective: every block keeps `selective_bytes`, and one is computed again.
    The rest: the cast image, its patches, the mask or the ids of what is visible, the inputs of the last norms, of the
    projection into the decoder (of a linear head: of the choice of tokens) and of the prediction, and the fp32 error.
    With torch.compile it is less; that is not counted on.
    """
    mode = config.train.activation_checkpointing
    row, model, decoder, t = FAMILY[config.model.size], config.model, config.model.decoder, tokens(config)
    w, backends = widths(config.train.precision, device, autocast), attention_backends(config, device)
    sequences, passes = micro_batch * t.windows, micro_batch * t.passes
    encoder = Shape(row.dim, row.heads, t.encoded, sequences, relative(config), options(config))
    narrow = Shape(decoder.width, decoder.heads, t.decoded, passes, relative(config))
    stacks = ((encoder, row.depth), (narrow, decoder.depth))
    parts = [(s, depth, backend) for (s, depth), backend in zip(stacks, backends, strict=False)]
    full = [block_bytes(s, w, backend, device) for s, _, backend in parts]
    kept = {
        "none": full,
        "selective": [selective_bytes(s, w, backend, device) for s, _, backend in parts],
        "full": [s.values * w.element for s, _, _ in parts],
    }[mode]
    blocks = sum(each * depth for each, (_, depth, _) in zip(kept, parts, strict=True))
    masked = passes * t.masked
    e, picture = w.element, config.data.image_size**2 * model.channels
    rest = micro_batch * (t.patches * row.dim + (picture if e < 4 else 0)) * e
    rest += sequences * (t.inside if t.visible is None else 8 * (t.visible - t.prefix))  # the mask, or what is visible
    taken = sequences * t.taken * row.dim
    rest += encoder.values * w.norm + taken * e + 8 * sequences * t.encoded  # final norm, what takes its result
    if decoder.depth:
        rest += narrow.values * e + masked * (decoder.width * (w.norm + e) + 8)  # gather, norm, prediction
    else:
        rest += masked * row.dim * e  # prediction
    rest += 4 * masked * t.values * (2 if t.blocks else 1)  # the error; of a teacher, both sides of it
    whole = [position_bytes(s, w, backend, device) for s, _, backend in parts]
    lasting = {"none": whole, "selective": [position_bytes(s, w, b, device, True) for s, _, b in parts]}
    positions = sum(
        each * depth for each, (_, depth, _) in zip(lasting.get(mode, [0] * len(parts)), parts, strict=True)
    )
    if mode == "none":
        return Activations(blocks, rest, 0, positions)
    return Activations(blocks, rest, max(full), positions + whole[full.index(max(full))])


def batch_bytes(config: Config, micro_batch: int) -> int:
    """Images in fp32, targets of the masked tokens in fp32, and int64 ids of windows and masks.

    The maps the targets are cut from do not count: they are gone before the first activation lives.
    """
    t = tokens(config)
    picture = 4 * config.data.image_size**2 * config.model.channels
    if t.blocks:  # the target is made in the forward pass
        return micro_batch * (picture + 8 * (t.taken + t.blocks * t.masked))
    return micro_batch * (picture + t.windows * (t.masked * (4 * t.target + 8) + 8 * t.inside))
