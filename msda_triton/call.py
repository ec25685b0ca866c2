"""`Call`: the operands of one call, checked, in the order and by the names of the operators' schemas."""

from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The operands of multi-scale deformable attention; the legend is in `reference.py`.

    Plain calls have sampling locations and attention weights. Fused calls have reference points, with offsets from them
    in the field `locations` and the logits of a softmax in `weights`.
    """

    value: Tensor  # [B, S, M, D], any strides
    spatial_shapes: Tensor  # [L, 2] integer (H, W), on value's device
    level_start_index: Tensor | None  # [L] integer, first token of each level; None: one level after the other
    locations: Tensor  # [B, Q, M, K, 2] (x, y); or offsets
    weights: Tensor  # [B, Q, M, K]; or logits
    num_points: list[int]  # points of each level, which sum to K
    reference_points: Tensor | None = None  # [B, Q, L or 1, 2 or 4]
    value_mask: Tensor | None = None  # [B, S] bool, True on padding
    level_sizes: list[int] | tuple[int, ...] = ()  # H, W of each level in turn; empty if the host does not know them

    def changed(self, **fields) -> "Call":
        """The call with other fields: `_replace`, which Dynamo of torch 2.7 does not know."""
        return Call(**{**dict(zip(Call._fields, self, strict=True)), **fields})
