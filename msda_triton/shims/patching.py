"""`patch` and `unpatch`: put the stand-ins in place of what is installed or imported, and back."""

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from msda_triton.shims.c_extension import stand_in
from msda_triton.shims.entry_points import (
    EXTENSIONS,
    FUNCTION_CLASSES,
    FUNCTIONS,
    LAYERS,
    PACKAGES,
    EntryPoint,
    small_call,
)

_ALIASES = {"c_extension": "MultiScaleDeformableAttention", "hf": "transformers"}
_OURS = ("msda_triton", "torch", "torchvision", "triton")
_ABSENT = object()
# what the import of a package raises that lacks something, a GPU among other things
_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, NameError, AssertionError, TypeError, ValueError)
_active: list["Patch"] = []


class Row(NamedTuple):
    entry_point: str
    replaced: bool
    why: str  # where it was replaced, or why it was not


class Change(NamedTuple):
    namespace: dict | type  # of a module, an object or `sys.modules`; or a class
    name: str
    before: Any
    after: Any


class Patch:
    """What a call of `patch` did: `rows`, and a table of them as its text. Leaving its `with` block undoes it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.changes: list[Change] = []
        self.replaced: dict[int, tuple[Any, Any]] = {}  # by the id of the original: it and its stand-in
        self.modules_before = set(sys.modules)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to replace: no package with multi-scale deformable attention is installed or imported"
        width = max(len(row.entry_point) for row in self.rows)
        return "\n".join(
            f"{row.entry_point:{width}}  {'replaced' if row.replaced else 'left alone'}: {row.why}" for row in self.rows
        )

    __repr__ = __str__

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.undo()

    def undo(self) -> None:
        """Put back what this call replaced, where nobody has replaced it again since."""
        if self in _active:
            _active.remove(self)
        for change in reversed(self.changes):
            _restore(change)
        self._recall_stand_ins()
        self.changes, self.replaced = [], {}

    def _set(self, namespace: dict | type, name: str, after: Any) -> None:
        before = (vars(namespace) if isinstance(namespace, type) else namespace).get(name, _ABSENT)
        self.changes.append(Change(namespace, name, before, after))
        if isinstance(namespace, type):
            setattr(namespace, name, after)
        else:
            namespace[name] = after

    def _recall_stand_ins(self) -> None:
        """What the patched packages imported or built in the meantime holds stand-ins: it gets the originals.

        A module of another package keeps what it imported by name: it may have wanted just that.
        """
        originals = {}
        for original, ours in self.replaced.values():
            originals.setdefault(id(ours), []).append(original)
        for owner, namespace in _holders():
            if isinstance(owner, ModuleType) and owner.__name__ in self.modules_before:
                continue
            for name, held in list(namespace.items()):
                candidates = originals.get(id(_inner(held)))
                if candidates:
                    original = _own(candidates, owner)
                    if original is not None:
                        namespace[name] = _like(held, original)


def patch(*names: str) -> Patch:
    """Run the models of other packages on msda_triton, from their next call on.

    Compiled extensions, functions and autograd functions are replaced in every module that holds them and in every
    `nn.Module` that captured them; the attention layer of transformers gets another `forward`, in its class. So models
    that exist already change too. Installed packages that hold entry points are imported for it.

    Args:
        names: packages or modules: "transformers", "mmcv", "detrex", "groundingdino", "rfdetr", "DCNv4",
            "torch_ms_deform_attn"; "c_extension" for the compiled `MultiScaleDeformableAttention`; or any package that
            was imported, such as "models.ops" or "src.zoo.rtdetr". None of them: all that there are.
    Returns:
        A `Patch`: print it for a table of what was replaced, what was not, and why; in a `with` statement everything is
        as before at the end.
    Raises:
        ValueError: nothing of that name is installed or imported, or nothing there can be replaced.
    """
    result, done = Patch(), False
    names = tuple(_ALIASES.get(name, name) for name in names)
    _active.append(result)
    try:
        for name in names or PACKAGES:
            _import(result, name, asked=name in names)
        _replace_extensions(result, names)
        _replace_objects(result, names)
        _replace_layers(result, names)
        for name in names:
            if not any(_below(row.entry_point, name) for row in result.rows):
                raise ValueError(f"names: {name!r} is there, but nothing imported from it has a known entry point")
        done = True
    finally:
        if not done:
            result.undo()
    return result


def unpatch() -> None:
    """Undo every `patch` that is in place, the last one first."""
    while _active:
        _active[-1].undo()


def installed_packages() -> list[tuple[str, str]]:
    """Each package that `patch` knows, and whether it is installed and in which version. Imports none of them."""
    found = [(name, f"{_version(name)}, can be patched" if _is_there(name) else "not installed") for name in PACKAGES]
    extension = "MultiScaleDeformableAttention"
    there = "compiled, can be patched" if _is_there(extension) else "not compiled, can be stood in for"
    return [*found, (extension, there)]


def _import(result: Patch, name: str, asked: bool) -> None:
    """Import what holds the entry points of a known package; a missing compiled extension of it is stood in for."""
    if name in EXTENSIONS and "." not in name:
        return
    if not _is_there(name):
        if asked:
            raise ValueError(f"names: expected an installed package or an imported module, got {name!r}")
        return
    for extension in EXTENSIONS:
        if extension.startswith(f"{name}.") and not _is_there(extension):
            result._set(sys.modules, extension, stand_in(extension, EXTENSIONS[extension]))
            result.rows.append(Row(extension, True, "stood in for: it is not compiled"))
    for module in PACKAGES.get(name, []):
        try:
            importlib.import_module(module)
        except _IMPORT_ERRORS as error:
            if isinstance(error, ModuleNotFoundError) and error.name and _below(module, error.name):
                continue  # this version has no such module
            result.rows.append(Row(module, False, f"its import failed: {type(error).__name__}: {error}"))


def _replace_extensions(result: Patch, names: tuple[str, ...]) -> None:
    for name, functions in EXTENSIONS.items():
        module = sys.modules.get(name)
        if names and not any(_below(name, asked) for asked in names):
            continue
        if module is None:
            if "." not in name:
                result._set(sys.modules, name, stand_in(name, functions))
                result.rows.append(Row(name, True, "stood in for: it was not imported"))
            continue
        for function, ours in functions.items():
            held = vars(module).get(function)
            if held is ours:
                if not any(row.entry_point == name for row in result.rows):
                    result.rows.append(Row(f"{name}.{function}", False, "an earlier patch() replaced it"))
            elif held is None:
                result.rows.append(Row(f"{name}.{function}", False, "the extension has no such function"))
            else:
                result._set(vars(module), function, ours)
                result.rows.append(Row(f"{name}.{function}", True, "in the compiled module"))


def _replace_objects(result: Patch, names: tuple[str, ...]) -> None:
    """Functions and autograd functions, wherever modules, or `nn.Module`s by themselves or in a partial, hold them."""
    for earlier in _active[:-1]:
        for original, _ in earlier.replaced.values():
            if not names or any(_below(_path(original), asked) for asked in names):
                result.rows.append(Row(_path(original), False, "an earlier patch() replaced it"))
    for original in _originals(names):
        stand_in_or_reason = _match(original)
        if isinstance(stand_in_or_reason, str):
            result.rows.append(Row(_path(original), False, stand_in_or_reason))
        else:
            result.replaced[id(original)] = original, stand_in_or_reason
    if not result.replaced:
        return
    modules, layers = dict.fromkeys(result.replaced, 0), dict.fromkeys(result.replaced, 0)
    for owner, namespace in _holders():
        for name, held in list(namespace.items()):
            found = result.replaced.get(id(_inner(held)))
            if found is not None:
                result._set(namespace, name, _like(held, found[1]))
                (modules if isinstance(owner, ModuleType) else layers)[id(found[0])] += 1
    for key, (original, _) in result.replaced.items():
        where = f"in {modules[key]} module{'s' * (modules[key] != 1)}"
        if layers[key]:
            where += f" and {layers[key]} nn.Module{'s' * (layers[key] != 1)} that had captured it"
        result.rows.append(Row(_path(original), True, where))
        partials = [x for x in gc.get_referrers(original) if type(x) is functools.partial]
        ours = {id(change.before) for change in result.changes}
        lost = sum(id(x) not in ours for x in partials)
        if lost:
            result.rows.append(
                Row(_path(original), False, f"held by {lost} functools.partial outside of any nn.Module")
            )


def _replace_layers(result: Patch, names: tuple[str, ...]) -> None:
    own_forward = {id(type(x)) for x in _live_modules() if "forward" in vars(x)}
    for module in _modules():
        for name, entry in LAYERS.items():
            layer = vars(module).get(name)
            if not inspect.isclass(layer) or layer.__module__ != module.__name__ or not issubclass(layer, nn.Module):
                continue
            path = f"{_path(layer)}.forward"
            if names and not any(_below(path, asked) for asked in names):
                continue
            if layer.forward in entry.stand_ins:
                result.rows.append(Row(path, False, "an earlier patch() replaced it"))
                continue
            found = _same_numbers(layer.forward, [entry])
            if not isinstance(found, str):
                result._set(layer, "forward", found)
                result.rows.append(Row(path, True, "in its class"))
                if id(layer) in own_forward:
                    why = "an nn.Module of this class has a forward of its own, which stays (from package kernels?)"
                    result.rows.append(Row(path, False, why))
            elif module.__name__.startswith("transformers."):
                result.rows.append(Row(path, False, found))


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.split(".")[0] not in _OURS:
            yield module


def _live_modules() -> Iterator[nn.Module]:
    # by type: an object may answer isinstance with code of its own
    return (x for x in gc.get_objects() if issubclass(type(x), nn.Module))


def _holders() -> Iterator[tuple[ModuleType | nn.Module, dict]]:
    for owner in (*_modules(), *_live_modules()):
        yield owner, vars(owner)


def _originals(names: tuple[str, ...]) -> list[Any]:
    """The functions and classes with a known name that other packages define, each once."""
    found = {}
    for module in _modules():
        for name in (*FUNCTIONS, *FUNCTION_CLASSES):
            held = vars(module).get(name)
            right = inspect.isclass(held) if name in FUNCTION_CLASSES else inspect.isfunction(held)
            if not right or held.__name__ != name or (held.__module__ or "torch").split(".")[0] in _OURS:
                continue
            if not names or any(_below(_path(held), asked) for asked in names):
                found[id(held)] = held
    return list(found.values())


def _match(original: Any) -> Any:
    """The stand-in of a function or autograd function, or the reason why there is none."""
    name = original.__name__
    if name in FUNCTIONS:
        return _same_numbers(original, FUNCTIONS[name])
    entry, forward = FUNCTION_CLASSES[name], getattr(original, "forward", None)
    if not issubclass(original, torch.autograd.Function) or forward is None:
        return "is no torch.autograd.Function"
    arguments = _arguments(forward).split(" ", 1)[-1]  # without ctx, whatever its name
    if arguments != entry.arguments:
        return _other_arguments(original, arguments, [entry])
    return entry.stand_ins[0]


def _same_numbers(original: Any, entries: list[EntryPoint]) -> Any:
    """The stand-in with the same arguments and, on small calls, the same results as the original; or a reason."""
    arguments = _arguments(original)
    entry = next((entry for entry in entries if entry.arguments == arguments), None)
    if entry is None:
        return _other_arguments(original, arguments, entries)
    results, error = {}, None
    for layout in itertools.product(entry.layouts.split(), (False, True)):
        try:
            with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
                results[layout] = original(*small_call(*layout))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NameError) as caught:
            error = error or caught  # of another layout: one of them must run
    if not results:
        return f"{_package(original)}: a small call raised {type(error).__name__}: {error}"
    for ours in entry.stand_ins:
        with torch.no_grad():
            if all(_equal(ours(*small_call(*layout)), result) for layout, result in results.items()):
                return ours
    layouts = ", ".join(dict.fromkeys(layout for layout, _ in results))
    return f"{_package(original)}: a small call gave other numbers ({layouts})"


def _equal(ours: torch.Tensor, theirs: Any) -> bool:
    same_kind = isinstance(theirs, torch.Tensor) and theirs.shape == ours.shape and theirs.dtype == ours.dtype
    return same_kind and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def _arguments(function: Any) -> str:
    return " ".join(inspect.signature(function).parameters)


def _other_arguments(original: Any, arguments: str, entries: list[EntryPoint]) -> str:
    expected = " or ".join(f"({entry.arguments.replace(' ', ', ')})" for entry in entries)
    return f"{_package(original)}: its arguments are ({arguments.replace(' ', ', ')}), expected {expected}"


def _inner(held: Any) -> Any:
    return held.func if type(held) is functools.partial else held


def _like(held: Any, function: Any) -> Any:
    return functools.partial(function, *held.args, **held.keywords) if type(held) is functools.partial else function


def _own(candidates: list[Any], owner: ModuleType | nn.Module) -> Any:
    """Which of the originals the owner's module means: the one that it holds, or the one of its package."""
    home = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__module__
    namespace = vars(sys.modules[home]) if home in sys.modules and not isinstance(owner, ModuleType) else {}
    held = [x for x in candidates if any(x is value for value in namespace.values())]
    same_package = [x for x in candidates if x.__module__.split(".")[0] == home.split(".")[0]]
    for choice in (held, same_package):
        if len(choice) == 1:
            return choice[0]
    return None


def _restore(change: Change) -> None:
    namespace, name, before, after = change
    is_class = isinstance(namespace, type)
    if (vars(namespace) if is_class else namespace).get(name, _ABSENT) is not after:
        return  # somebody else's by now
    if before is _ABSENT:
        delattr(namespace, name) if is_class else namespace.pop(name)
    elif is_class:
        setattr(namespace, name, before)
    else:
        namespace[name] = before


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _package(thing: Any) -> str:
    package = thing.__module__.split(".")[0]
    return f"{package} {_version(package)}".strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", ""))
