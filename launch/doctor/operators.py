"""Every backend of the two operators, forward and backward on the device of a process, against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from launch.doctor.rows import Frozen, Place, Row, Status, each

TOLERANCE = 5e-3
"""Largest error, relative to the largest value: TF32 passes, a kernel that was built for another device does not."""
HALF_TOLERANCE = 3e-2
"""Of a backend that takes bf16 only."""
GRID, HEADS, WIDTH = (4, 4), 2, 32
RADII = (3, 5)


class Outcome(Frozen):
    """How one backend did."""

    operator: str
    backend: str
    error: float | None = None
    """Relative to the largest value of the definition; None: it did not run to its end."""
    tolerance: float = TOLERANCE
    unavailable: str = ""
    failure: str = ""


class Outcomes(Frozen):
    """All backends on one device; `failure`: the package itself cannot be used."""

    results: tuple[Outcome, ...] = ()
    failure: str = ""


def look(device: torch.device) -> Outcomes:
    """Run each backend that says it can run here."""
    try:
        # Not at the top: another package may answer to this name, which must not end the search for such things.
        from kernels.gradient_ratio import BACKENDS as TARGETS
        from kernels.rpe_attention import BACKENDS as ATTENTION
    except ImportError as error:
        return Outcomes(failure=f"{type(error).__name__}: {error}")
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results += [_attention_outcome(name, row, device) for name, row in ATTENTION.items()]
        for name, target in TARGETS.items():
            outcome = Outcome(operator="gradient_ratio", backend=name, unavailable=target.unavailable)
            results.append(outcome if target.unavailable else _outcome(outcome, _gradient_ratio, name, device))
    return Outcomes(results=tuple(results))


def _outcome(outcome: Outcome, trial: Callable[..., float], *arguments: Any) -> Outcome:
    try:
        return outcome.model_copy(update={"error": trial(*arguments)})
    except Exception as error:  # a kernel that does not load may fail with anything: that is what is looked for
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return outcome.model_copy(update={"failure": f"{type(error).__name__}: {text}"})


def _attention_outcome(name: str, row: Any, device: torch.device) -> Outcome:
    """In fp32 where the backend takes it, else in bf16; without a table where it takes none."""
    from kernels.rpe_attention import trials

    problems = sorted(trials(device.type, HEADS, WIDTH, GRID), key=lambda p: p.dtype != torch.float32)
    reasons = [row.refuses(problem) for problem in problems]
    if "" not in reasons:
        return Outcome(operator="rpe_attention", backend=name, unavailable=reasons[0])
    problem = problems[reasons.index("")]
    tolerance = TOLERANCE if problem.dtype == torch.float32 else HALF_TOLERANCE
    outcome = Outcome(operator="rpe_attention", backend=name, tolerance=tolerance)
    return _outcome(outcome, _attention, name, device, problem)


def _attention(backend: str, device: torch.device, problem: Any) -> float:
    """Error of the output and of all gradients."""
    from kernels.rpe_attention import rpe_attention

    random = torch.Generator().manual_seed(0)
    shape = (1, HEADS, problem.layout.length, WIDTH)
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in "qkv"]
    if problem.bias != "none":
        inputs.append(torch.randn(1, WIDTH, problem.layout.columns, generator=random, dtype=torch.float64) / WIDTH**0.5)
    inputs = [each.to(problem.dtype).double() for each in inputs]  # what the backend is given, exactly
    weight = torch.randn(shape, generator=random, dtype=torch.float64)

    def run(name: str, place: torch.device, dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.to(place, dtype).requires_grad_() for each in inputs]
        q, k, v, *table = leaves
        out = rpe_attention(q, k, v, table[0] if table else None, GRID, backend=name)
        (out.double() * weight.to(place)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    found = run(backend, device, problem.dtype)
    expected = run("reference", torch.device("cpu"), torch.float64)
    return max(_error(one, other) for one, other in zip(found, expected, strict=True))


def _gradient_ratio(backend: str, device: torch.device) -> float:
    """Error of the maps, of an 8-bit and of a float image; the target has no gradient."""
    from kernels.gradient_ratio import gradient_ratio

    random = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (1, 1, 24, 24), generator=random, dtype=torch.uint8)
    expected = gradient_ratio(bytes_.double() / 255, RADII, backend="reference")
    images = (bytes_, bytes_.float() / 255)
    return max(_error(gradient_ratio(image.to(device), RADII, backend=backend), expected) for image in images)


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where a value is not finite."""
    expected = expected.double()
    error = float((found.double().cpu() - expected).abs().max() / expected.abs().max())
    return error if error < float("inf") else float("inf")


def rows(places: Sequence[Place], facts: Sequence[Outcomes]) -> Iterator[Row]:
    """What runs and is right, what is wrong, what cannot run here."""
    right = [result.error for fact in facts for result in fact.results if _right(result)]
    for row in each("kernels", places, (_verdict(fact) for fact in facts)):
        error = f"; largest error {max(filter(None, right), default=0.0):.1e}" if row.status is Status.ok else ""
        yield row._replace(found=row.found + error)
    absent = (
        "; ".join(f"{one.operator} {one.backend}: {one.unavailable}" for one in fact.results if one.unavailable)
        for fact in facts
    )
    for row in each("kernels not here", places, ((Status.note, text, "") for text in absent)):
        if row.found.strip():
            yield row


def _right(result: Outcome) -> bool:
    return result.error is not None and result.error <= result.tolerance


def _verdict(fact: Outcomes) -> tuple[Status, str, str]:
    if fact.failure:
        return Status.failed, fact.failure, "see that `kernels` is the package of this project (row packages)"
    run = [result for result in fact.results if not result.unavailable]
    if wrong := [f"{r.operator} {r.backend}: {_trouble(r)}" for r in run if not _right(r)]:
        do = "build the kernels for these nodes again; until then choose another backend: foundation list attention"
        return Status.failed, "; ".join(wrong), do
    names: dict[str, list[str]] = {}
    for result in run:
        names.setdefault(result.operator, []).append(result.backend)
    return Status.ok, "; ".join(f"{operator}: {', '.join(backends)}" for operator, backends in names.items()), ""


def _trouble(result: Outcome) -> str:
    return result.failure or f"differs from the definition by {result.error:.1e} of its largest value"
