"""msda_triton's layer in the form that the package `kernels` loads."""

from msda_triton.shims import transformers as layers

__all__ = ["layers"]
