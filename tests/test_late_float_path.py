"""What of the late-float path needs no device."""

from __future__ import annotations

import pytest
import torch

from adaptlr.device_path import is_one_piece

PIECES = {
    "contiguous": (torch.ones(4, 3), True),
    "scalar": (torch.ones(()), True),
    "channels last": (torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), True),
    "channels last 3d": (torch.ones(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d), True),
    "columns": (torch.ones(4, 6)[:, ::2], False),
    "expanded": (torch.ones(1).expand(4, 3), False),
    "transposed": (torch.ones(4, 3).t(), False),
}


@pytest.mark.parametrize("name", PIECES)
def test_only_memory_without_gaps_is_zeroed_as_one_range(name):
    tensor, one_piece = PIECES[name]
    assert is_one_piece(tensor) is one_piece
