"""Learned and user prompts of the same pairs become one set, before anything is embedded (METHODS 1.2).

Empty user = autonomous mode; empty learned = plain SAM; both = the interactive mode. Pure functions on tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from lib.contracts import PromptSet


def merge(learned: PromptSet, user: PromptSet, *, yields: bool = False) -> PromptSet:
    """Points, boxes and free tokens are concatenated, learned ones first; a user's mask wins over the learned one.

    Args:
        learned: of N pairs, or empty.
        user: of the same N pairs, or empty.
        yields: True lets a pair's learned points give way where the user has points on it, and boxes likewise.

    Returns:
        A set of N pairs.
    """
    if yields:
        learned = _given_way(learned, user)
    masks, given = _masks(learned, user)
    points, labels = _cat(learned.points_xy, user.points_xy), _cat(learned.labels, user.labels)
    boxes = _cat(_several(learned.boxes_xy), _several(user.boxes_xy))
    dense = user.dense if user.dense is not None else learned.dense
    return PromptSet(points, labels, boxes, masks, given, _cat(learned.tokens, user.tokens), dense)


def _given_way(learned: PromptSet, user: PromptSet) -> PromptSet:
    labels, boxes = learned.labels, _several(learned.boxes_xy)
    if labels is not None and user.labels is not None:
        labels = torch.where((user.labels >= 0).any(1, keepdim=True), -1, labels)
    if boxes is not None and user.boxes_xy is not None:
        said = torch.isfinite(user.boxes_xy).reshape(len(boxes), -1, 4).all(2).any(1)
        boxes = torch.where(said[:, None, None], torch.nan, boxes)
    return replace(learned, labels=labels, boxes_xy=boxes)


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
