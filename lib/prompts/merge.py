"""Learned and user prompts of the same pairs become one set, before anything is embedded (METHODS 1.2).

Empty user = autonomous mode; empty learned = plain SAM; both = the interactive mode. Pure functions on tensors.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from lib.contracts import PromptSet


def merge(learned: PromptSet, user: PromptSet) -> PromptSet:
    """Points, boxes and free tokens are concatenated, learned ones first; a user's mask wins over the learned one.

    Args:
        learned: of N pairs, or empty.
        user: of the same N pairs, or empty.

    Returns:
        A set of N pairs.
    """
    masks, given = _masks(learned, user)
    points, labels = _cat(learned.points_xy, user.points_xy), _cat(learned.labels, user.labels)
    boxes = _cat(_several(learned.boxes_xy), _several(user.boxes_xy))
    dense = user.dense if user.dense is not None else learned.dense
    return PromptSet(points, labels, boxes, masks, given, _cat(learned.tokens, user.tokens), dense)


def _several(boxes: Optional[Tensor]) -> Optional[Tensor]:
    return boxes if boxes is None else boxes.reshape(boxes.shape[0], -1, 4)


def _cat(first: Optional[Tensor], second: Optional[Tensor]) -> Optional[Tensor]:
    parts = [p for p in (first, second) if p is not None]
    return torch.cat(parts, 1) if parts else None


def _masks(learned: PromptSet, user: PromptSet) -> tuple[Optional[Tensor], Optional[Tensor]]:
    if learned.masks is None or user.masks is None:
        one = user if learned.masks is None else learned
        return one.masks, one.mask_given
    if user.mask_given is None:
        return user.masks, None
    wins = user.mask_given.view(-1, 1, 1, 1)
    given = None if learned.mask_given is None else learned.mask_given | user.mask_given
    return torch.where(wins, user.masks, learned.masks), given
