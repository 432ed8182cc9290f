"""Shapes of what small one-block models share, whatever their layers."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def token_shapes(width: int) -> Shapes:
    """Embeddings of 11 item rows and 3 actions, item biases of two tasks, and one table for each side feature."""
    return {
        "item": (11, width),
        "action": (4, width),
        "item_bias": (11, 2),
        "features/item.genre": (3, width),
        "features/item.tags": (4, width),
        "features/user.age": (1, width),
        "features/context.hour": (24, width),
    }


def head_shapes(experts: int, width: int) -> Shapes:
    """Experts of 6 numbers and towers of 8, for two tasks."""
    return {
        "head/expert_w": (experts, width, 6),
        "head/expert_b": (experts, 6),
        "head/mix_w": (2, width, experts),
        "head/mix_b": (2, experts),
        "head/tower_w": (2, 6, 8),
        "head/tower_b": (2, 8),
        "head/logit_w": (2, 8),
        "head/logit_b": (2,),
    }
