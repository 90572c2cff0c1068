"""adaptlr where a framework owns the training loop: one module each, imported by nothing else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch.torch_version import TorchVersion

from adaptlr.controller import AdaptiveLR

_ABSENT = object()


def require(package: str, minimum: str) -> None:
    """Raise an ImportError that says what to install, unless ``package`` is there and new enough.

    Args:
        package: What pip, Python, and the extra of adaptlr call it.
        minimum: The oldest version that will do.
    """
    need = f"adaptlr.integrations.{package} needs {package}>={minimum}"
    remedy = f"pip install 'adaptlr[{package}]'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{need}, which is not installed: {remedy}") from None
    if TorchVersion(found) < minimum:
        raise ImportError(f"{need}, got {found}: {remedy}")


class Replacement:
    """Puts a value in front of an attribute of one object, until it is removed."""

    def __init__(self, owner: object, name: str, value: object) -> None:
        """Put ``value`` there."""
        self._attributes = vars(owner)
        self._name = name
        self._value = value
        self._before = self._attributes.get(name, _ABSENT)
        self._attributes[name] = value

    def remove(self) -> None:
        """Step aside, unless someone else stands in front by now."""
        if self._attributes.get(self._name) is not self._value:
            return
        if self._before is _ABSENT:
            del self._attributes[self._name]
        else:
            self._attributes[self._name] = self._before


def drop_waiting(controller: AdaptiveLR) -> None:
    """Forget losses whose step was never taken: GradScaler leaves it out when gradients overflow.

    For where a framework tells of it; plain loops are seen through by `pending`.
    """
    path: Any = controller._path
    if path.count:
        path.drop()
