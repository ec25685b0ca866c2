"""`Call`: the operands of one call, checked, in the order and by the names of the operators' schemas."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The operands of multi-scale deformable attention; the legend is in `reference.py`.

    Plain calls have sampling locations and attention weights. Fused calls have reference points, with offsets from them
    in the field `locations` and the logits of a softmax in `weights`. What the host knows of the levels is handed over
    as integers: a graph then holds no constants, and copies nothing to a device.
    """

    value: Tensor  # [B, S, M, D], any strides
    spatial_shapes: Tensor | None  # [L, 2] integer (H, W), on value's device; None: level_sizes has them
    level_start_index: Tensor | None  # [L] integer, first token of each level; None: level_starts has them
    locations: Tensor  # [B, Q, M, K, 2] (x, y), or [B, Q, M, L, P, 2]; or offsets
    weights: Tensor  # [B, Q, M, K], or [B, Q, M, L, P]; or logits
    num_points: Sequence[int]  # points of each level, which sum to K
    level_sizes: Sequence[int] = ()  # H, W of each level in turn; empty if the host does not know them
    level_starts: Sequence[int] = ()  # first token of each level; empty: not known, or one level after the other
    reference_points: Tensor | None = None  # [B, Q, L or 1, 2 or 4]
    value_mask: Tensor | None = None  # [B, S] bool, True on padding

    def changed(self, **fields) -> "Call":
        """The call with other fields: `_replace`, which Dynamo of torch 2.7 does not know."""
        return Call(**{**dict(zip(Call._fields, self, strict=True)), **fields})

    def flat(self) -> "Call":
        """The call with its K points in one dimension."""
        if self.weights.dim() == 4:
            return self
        value, shapes, starts, locations, weights, *rest = self
        return Call(value, shapes, starts, locations.flatten(3, 4), weights.flatten(3, 4), *rest)
