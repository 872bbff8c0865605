"""What the formulas give for runs that others have published or calculated."""

from __future__ import annotations

from typing import NamedTuple

from foundation.config import from_dict
from foundation.models.families import FAMILY, parameters
from foundation.planning.cluster import Cluster, communication, step_seconds

PRACTICAL = 790e12  # FLOP/s in bf16 that products reach on an H200: measured; the peak on paper is 989e12
OVERLAP = 0.5  # share of computing behind which communication can hide, assumed of runs of others


class Check(NamedTuple):
    """A published number beside what the formulas give for it; `note` names what was assumed or differs."""

    name: str
    published: float
    predicted: float
    note: str = ""
    unit: str = ""

    @property
    def deviation(self) -> float:
        """Relative."""
        return self.predicted / self.published - 1


# ms on 512 H100: computing, fsdp2, hsdp, ddp; 8 network cards a node, and for some sizes also one.
_TABLE = {
    "base": ((21.6, 57, 3.4, 1.4), (21.6, 72, 13, 11)),
    "large": ((64, 117, 9.7, 4.1),),
    "huge": ((127, 159, 19, 8),),
    "giant": ((190, 202, 28, 12), (190, 330, 112, 98)),
    "gigantic": ((315, 251, 46, 20),),
    "3b": ((556, 219, 79, 36),),
    "7b": ((1571, 335, 222, 101),),
    "22b": ((4233, 628, 596, 272), (4233, 3480, 2471, 2173)),
}


def table_checks() -> list[Check]:
    """The reference table of strategies on 512 GPUs: 12,800 tokens per GPU, bf16 gradients, 50 % of 790 TFLOP/s."""
    found = []
    for size, variants in _TABLE.items():
        count, depth = parameters(from_dict({"model": {"size": size}})).total, FAMILY[size].depth
        for nic, row in zip((400e9, 50e9), variants, strict=False):
            cluster = Cluster(512, nic=nic)
            seconds = [6 * count * 12_800 / (0.5 * PRACTICAL)]
            seconds += [communication(engine, count, depth, cluster) for engine in ("fsdp2", "hsdp", "ddp")]
            names = ("compute", "fsdp2", "hsdp", "ddp")
            found += [
                Check(f"{size} {name}, {nic / 50e9:.0f} x 400 Gb/s", published, second * 1e3, unit="ms")
                for name, published, second in zip(names, row, seconds, strict=True)
            ]
    return found


def scaling_checks() -> list[Check]:
    """Scaling efficiencies that others measured; the single-node or smallest run sets the computing time."""

    def efficiency(
        engine: str, count: float, units: int, step: float, clusters: tuple[Cluster, Cluster], k: int
    ) -> float:
        """Speed per GPU on the second cluster relative to the first, whose step takes `step` seconds."""
        few, many = (communication(engine, count, units, c, reduce=4 if k > 1 else 2, accumulation=k) for c in clusters)
        return step / step_seconds(step - (1 - OVERLAP) * few, many, OVERLAP)

    h100 = (Cluster(8), Cluster(128))
    a100 = tuple(c._replace(nic=200e9, nvlink=235e9) for c in h100)
    nemo = "32 images per GPU assumed; the formula knows no stragglers and no data"
    vela = (Cluster(128, nic=50e9, nvlink=235e9), Cluster(512, nic=50e9, nvlink=235e9))
    one, four = Cluster(1, 4, "h200", 200e9), Cluster(4, 4, "h200", 200e9)
    # With TP=4 a node counts as one process of FSDP: each of its GPUs has a quarter of the weights and a card.
    forge = [
        (44_299, Cluster(2, 1, "h200", 200e9)),
        (82_988, Cluster(4, 1, "h200", 200e9)),
        (155_917, Cluster(8, 1, "h200", 200e9)),
    ]
    alone, tensor = 10_471, 25_135 / 10_471 / 4  # tokens/s of one GPU; efficiency of TP=4 in a node, as published
    wide = (Cluster(8, 1, "h200", 200e9), Cluster(40, 1, "h200", 200e9))
    cards = "4 x 400 Gb/s per node assumed"
    return [
        Check("NeMo ViT-g/14, 1 to 16 nodes of 8 H100, ddp", 0.944,
              efficiency("ddp", 1.011e9, 40, 32 / 178.5, h100, 1), nemo),
        Check("NeMo ViT-g/14, 1 to 16 nodes of 8 A100, ddp", 0.960,
              efficiency("ddp", 1.011e9, 40, 32 / 86.6, (a100[0], a100[1]), 1), nemo),
        Check("IBM Llama-7B, 128 to 512 A100, hsdp", 1.0,
              efficiency("hsdp", 6.74e9, 32, 2 * 4096 / 3700, vela, 1), "published as near-linear, without a number"),
        Check("KempnerForge 7B, 1 to 4 H200 in a node, fsdp2", 38_983 / alone / 4,
              efficiency("fsdp2", 8.03e9, 32, 3.13, (one, four), 2)),
        *(Check(f"KempnerForge 7B, 1 to {4 * far.world} H200, TP=4 x fsdp2", speed / alone / far.world / 4,
                tensor * efficiency("fsdp2", 8.03e9, 32, 1.30, (far._replace(world=1), far), 2),
                f"{tensor:.2f} of it is the published TP=4 in a node; {cards}") for speed, far in forge),
        Check("KempnerForge 13B, 32 to 160 H200, TP=4 x fsdp2", 534_644 / 110_373 / 5,
              efficiency("fsdp2", 14.84e9, 40, 4.75, wide, 4), cards),
    ]  # fmt: skip
