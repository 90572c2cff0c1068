"""Every optimizer of torch.optim in each of its forms, and the path that adaptlr takes on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from adaptlr.device_flags import CAPTURABLE, FUSED, why_not_by_flags

# As few arguments as show every branch: moments and weight decay where there are any.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adadelta": {"lr": 0.5},
    "RMSprop": {"lr": 0.01, "momentum": 0.9},
    "Adagrad": {"lr": 0.05},
    "ASGD": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "SparseAdam": {"lr": 0.01},
    "LBFGS": {"lr": 0.1},
    "Rprop": {"lr": 0.01},
}
FUSES = ("SGD", "Adam", "AdamW", "Adagrad")
LOOPS_ONLY = ("Muon", "SparseAdam", "LBFGS")
FORMS: tuple[dict[str, bool], ...] = ({}, {"fused": True}, {"foreach": True}, {"foreach": False})
DEVICE_CONTROLLED = (FUSED, CAPTURABLE)
SKIPS = {
    FUSED: "exact",
    CAPTURABLE: "parameters exact; moments decay by one tick",
    "float": "gradients zeroed; momentum and weight decay still act",
}
NOTES = {
    "SparseAdam": "sparse gradients",
    "LBFGS": "needs a closure; the rate is set before it runs",
    "ASGD": "torch itself applies lr one step late",
    "Adagrad": "its tensor lr would cost two kernels a parameter",
    "Adafactor": "waits for the device by itself",
}
REFUSED = ("Rprop",)


def forms_of(name: str) -> Iterator[dict[str, bool]]:
    """Yield the flags that select each form of an optimizer, the default first."""
    for form in FORMS:
        if form and name in LOOPS_ONLY:
            continue
        if "fused" in form and name not in FUSES:
            continue
        yield form


def exists(name: str) -> bool:
    """Whether this torch has the optimizer."""
    return hasattr(torch.optim, name)


def label(name: str, form: dict[str, bool]) -> str:
    return " ".join([name, *(f"{flag}={value}" for flag, value in form.items())])


CASES = {
    label(name, form): (name, form)
    for name in ARGUMENTS
    if name not in REFUSED
    for form in forms_of(name)
}


def make(case: str, parameters: Any, **extra: Any) -> torch.optim.Optimizer:
    """Make the optimizer of a case."""
    name, form = CASES[case]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(
        parameters, **ARGUMENTS[name], **form, **extra
    )
    return optimizer


def expected_path(case: str) -> str:
    """Return the path that ``device_path="auto"`` takes for plain parameters on CUDA."""
    if not exists(CASES[case][0]):
        return "float"  # Muon, which torch has since 2.9
    optimizer = make(case, [torch.nn.Parameter(torch.zeros(2, 2))])
    for form in DEVICE_CONTROLLED:
        if why_not_by_flags(form, optimizer) is None:
            return form
    return "float"


def table() -> str:
    """Return the table of docs/optimizers.md."""
    lines = ["| optimizer | path | a skipped step | |", "|---|---|---|---|"]
    for case, (name, form) in CASES.items():
        path = expected_path(case)
        flags = ", ".join(f"`{flag}={value}`" for flag, value in form.items())
        shown = f"`{name}`" + (f", {flags}" if flags else "")
        lines.append(f"| {shown} | {path} | {SKIPS[path]} | {NOTES.get(name, '')} |")
    for name in REFUSED:
        lines.append(f"| `{name}` | refused | | reads lr in its first step only |")
    return "\n".join(lines)
