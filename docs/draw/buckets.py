"""Draws docs/images/buckets.png: how two products spread the buckets of a 7 x 7 window over its pairs of patches.

python docs/draw/buckets.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from kernels.rpe_attention.buckets import piecewise_index, product_buckets

GRID = 7
torch.manual_seed(3)
table = torch.randn(64, 49)
for _smooth in range(3):  # a table with some structure is easier to read
    table = table + torch.roll(table, 1, 1) + torch.roll(table, 7, 1)
queries = torch.randn(49, 64)

looked_up = torch.zeros(8, 8, 8, 8)  # query y, x; bucket a, b
looked_up[:7, :7, :7, :7] = (queries @ table).view(7, 7, 7, 7)
index = torch.tensor([[piecewise_index(y - r) + 3 for r in range(8)] for y in range(8)])
one_hot = torch.nn.functional.one_hot(index, 8).float()  # [8, 8, buckets]
rows = torch.einsum("yz,yra->yrza", torch.eye(8), one_hot).reshape(64, 64)
columns = torch.einsum("xz,xsb->zbxs", torch.eye(8), one_hot).reshape(64, 64)
swapped = looked_up.permute(0, 2, 1, 3).reshape(64, 64)
pairs = rows @ swapped @ columns
bias = pairs.view(8, 8, 8, 8).permute(0, 2, 1, 3)[:7, :7, :7, :7].reshape(49, 49)
assert torch.equal(bias, (queries @ table).gather(1, product_buckets((GRID, GRID), 0)))

figure, axes = plt.subplots(1, 5, figsize=(15, 3.5), width_ratios=[1, 1, 1, 1, 1], layout="constrained")
limit = float(bias.abs().max())
panels = (
    (rows, "0/1: query row $y$ sees\nrow $r$ of the key in bucket $a$", "$(y', a)$", "$(y, r)$", "Greys", (0, 1)),
    (swapped, "products of queries and table", "$(x, b)$", "$(y, a)$", "RdBu", (-limit, limit)),
    (columns, "0/1: column $x$ sees\ncolumn $s$ in bucket $b$", "$(x, s)$", "$(x', b)$", "Greys", (0, 1)),
    (pairs, "the bias of every pair", "$(x, s)$", "$(y, r)$", "RdBu", (-limit, limit)),
    (bias, "the same, by query and key", "key $(r, s)$", "query $(y, x)$", "RdBu", (-limit, limit)),
)
for axis, (values, title, across, down, colours, limits) in zip(axes, panels, strict=True):
    axis.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axis.set(xlabel=across, ylabel=down, xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
figure.get_layout_engine().set(wspace=0.16)
figure.canvas.draw()
for left, right, sign in zip(axes[:-1], axes[1:], "··=→", strict=True):
    middle = (left.get_position().x1 + right.get_position().x0) / 2 - 0.008
    figure.text(middle, 0.5, sign, fontsize=20, ha="center", va="center")
figure.savefig(Path(__file__).parents[1] / "images" / "buckets.png", dpi=110)
