"""Triton's interpreter, without what it does twice."""

import importlib.util


def patch_the_language_once_a_launch() -> None:
    """Leave out a walk through `triton.language` that was half of the time of an interpreted kernel.

    The interpreter patches the members of that module for a launch, and again in each call of a device function, where
    they are patched already. Nothing is done without Triton, or before its version 3.6.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope
    languages: dict[object, list] = {}  # those that a function sees

    def patch_what_is_not(function):
        if function not in languages:
            seen = list(function.__globals__.values())
            languages[function] = [module for module in (tl, tl.core) if any(value is module for value in seen)]
        unpatched = any(tl.core.is_builtin(module.load) for module in languages[function])
        return patch(function) if unpatched else nothing()

    interpreter._patch_lang = patch_what_is_not
