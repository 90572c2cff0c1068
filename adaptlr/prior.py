"""`prior_lr`: the range in which others' learning rates for such a fine-tune lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaptlr.hooks import unwrap
from adaptlr.one_gradient import UpdateFamily, update_family

_ADAPTER_SHARE = 0.1  # of the weights; fewer trainable ones are adapters or a new head
_LION = 1 / 5  # the geometric middle of the 3 to 10 that Lion's authors give

_SMALL, _LARGE, _HUGE = 5e7, 1e9, 2e10  # parameters

# (up to how many parameters, low, typical, high), see `prior_lr`
_FULL_ADAM = (
    (_SMALL, 3e-5, 3e-4, 1e-3),
    (_LARGE, 1e-5, 3e-5, 1e-4),
    (_HUGE, 5e-6, 2e-5, 5e-5),
    (float("inf"), 2e-6, 1e-5, 3e-5),
)
_ADAPTER_ADAM = (
    (_SMALL, 3e-4, 1e-3, 5e-3),
    (_HUGE, 1e-4, 2e-4, 1e-3),
    (float("inf"), 5e-5, 1e-4, 3e-4),
)
_FULL_SGD = (1e-3, 1e-2, 1e-1)  # with momentum
_ADAPTER_SGD = (1e-2, 1e-1, 1.0)
_NO_MOMENTUM = 3.0  # SGD without momentum, see one_gradient.momentum_share


@dataclass(frozen=True)
class LRRange:
    """A range of usual learning rates.

    Attributes:
        low: Below it training is probably slow.
        typical: Where to begin.
        high: Above it training probably fails.
        kind: What the range is for.
    """

    low: float
    typical: float
    high: float
    kind: str

    def __repr__(self) -> str:
        """Show the three rates and what they are for."""
        return (
            f"LRRange({self.low:.1g} to {self.high:.1g}, typically {self.typical:.1g}: {self.kind})"
        )


def prior_lr(model: nn.Module, optimizer: torch.optim.Optimizer) -> LRRange:
    """Return the usual range of peak learning rates for fine-tuning such a model.

    From the number of weights, the share of them that is trained, and the optimizer alone: nothing
    is run. For pretrained weights; from-scratch training takes higher rates. Prefer `estimate_lr`
    or `find_lr`, which look at the task, and be suspicious where they leave this range.

    Sources. Adam, all weights: BERT 2e-5 to 5e-5 (Devlin et al. 2019, appendix A.3), RoBERTa 1e-5
    to 2e-5 (fairseq's settings for GLUE), Llama 2-Chat 2e-5 (Touvron et al. 2023, supervised
    fine-tuning), the default 5e-5 of transformers' ``Trainer``; up to 50 M weights our sweeps of
    MiniLM and EfficientNet-Lite (3e-4). Adapters: the scripts of LoRA's authors, among them 1e-4
    for DeBERTa XXL, 2e-4 for GPT-2 Medium and 3e-4 for RoBERTa Large on MNLI; those of QLoRA's,
    2e-4, above 13 B 1e-4; our sweep of LoRA on MiniLM (3e-3). Lion: Adam's by 3 to 10 (Chen et al.
    2023, section 5). SGD with momentum: BiT's fine-tuning script 3e-3, our sweeps of the same tasks
    (1e-2 to 3e-2, LoRA 1e-1). The ranges around these are our judgement.

    Args:
        model: Its weights are counted. Weights packed to 4 bits count half; the ranges are wide.
        optimizer: Which weights are trained, and how.

    Returns:
        The range, and what it was chosen for.

    Raises:
        ValueError: if there is no usual range for such an optimizer.
    """
    optimizer = unwrap(optimizer)
    family = update_family(optimizer)
    if family is None or family is UpdateFamily.ADAGRAD:
        raise ValueError(
            f"optimizer must be of the kind of Adam, Lion or SGD, got {type(optimizer).__name__}; "
            "estimate_lr works for any"
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    groups = optimizer.param_groups
    trained = sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)
    adapter = trained < _ADAPTER_SHARE * total
    low, typical, high = _rates(family, adapter, total, groups)
    what = f"{trained / max(total, 1):.1%} of" if adapter else "all"
    kind = f"{type(optimizer).__name__} on {what} {total / 1e6:.3g} M weights"
    return LRRange(low, typical, high, kind)


def _rates(
    family: UpdateFamily, adapter: bool, total: int, groups: list[dict[str, Any]]
) -> tuple[float, float, float]:
    if family is UpdateFamily.SGD:
        factor = 1.0 if any(group.get("momentum") for group in groups) else _NO_MOMENTUM
        low, typical, high = _ADAPTER_SGD if adapter else _FULL_SGD
    else:
        factor = _LION if family is UpdateFamily.SIGN else 1.0
        table = _ADAPTER_ADAM if adapter else _FULL_ADAM
        low, typical, high = next(rates for most, *rates in table if total <= most)
    return factor * low, factor * typical, factor * high
