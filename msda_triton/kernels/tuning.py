"""`set_autotune`: the fastest of several plans for a class of calls, timed once, kept in the user's cache.

Not `triton.autotune`: its keys are a kernel's arguments, and a class of calls is what `plan.Kind` says. What it keeps
on disk does not name the GPU.
"""

import contextlib
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import triton
from torch import Tensor

from msda_triton import user_cache
from msda_triton.kernels import plan as plans
from msda_triton.kernels.plan import Kind, Plan
from msda_triton.version import __version__

do_bench = functools.partial(triton.testing.do_bench, warmup=10, rep=50, return_mode="median")
# milliseconds that a function of no arguments takes; None: nothing is timed, and a table decides
timing: Callable[[Callable[[], object]], float] | None = None
# what a plan meets that this GPU, or its compiler, cannot run
CANNOT_RUN = (
    triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.compiler.CompilationError,
)  # fmt: skip

SUMS = "grad_value_ptr"  # what a kernel adds to
WRITTEN = ("out_ptr", "grad_loc_ptr", "grad_attn_ptr", "grad_ref_ptr")  # what it overwrites
# These jump where a sample lies at a pixel's centre, on the one side of which a plan's rounding may see it, and another
# plan's not: 7 of 11 million numbers on an H100. So this part of them may differ.
JUMPING, _JUMPS = ("grad_loc_ptr", "grad_ref_ptr"), 1e-4
GAIN = 1.02  # times faster than the table's plan: less is noise
# of the arguments, what a class of calls is made of besides its `Kind`
_CONSTANTS = ("M", "L", "K", "REF_DIM", "REF_L", "STRIDE_VS")

Start = Callable[[Plan], Callable[[], object]]  # launches with a plan; what launches the same again
_fastest: dict[str, Plan] = {}


def table_decides() -> bool:
    """Whether no plan runs because it was the fastest."""
    # another plan adds channels in another order: the last bit of a gradient would depend on the timing
    return timing is None or plans.INTERPRETED or torch.are_deterministic_algorithms_enabled()


def may_time(device: torch.device) -> bool:
    """Whether nobody records or compiles what is launched: that would be every repetition."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class TellsNothing(Exception):
    """A result is not finite throughout, or a sum zero: a plan that computes nothing would agree."""


def known(key: dict, candidates: Sequence[Plan]) -> Plan | None:
    """The fastest of the candidates for a class of calls, if this process or an earlier one has timed them."""
    text = _text(key)
    if text not in _fastest:
        found = _read(key)
        for plan in candidates:  # a file of another version may name one that is none any more
            if plan == found:
                _fastest[text] = plan
    return _fastest.get(text)


def fastest(key: dict, candidates: Sequence[Plan], start: Start, arguments: dict) -> Plan | None:
    """The fastest of the candidates, kept for the next call of the class. The first one is what runs untimed.

    It stays if no other is faster by more than noise. Where a result was rejected another process decides anew. None if
    the numbers of this call cannot tell a wrong plan from a right one: a later call may.

    Args:
        key: `key_of` the call. start, arguments: as in `measure`.
    """
    try:
        # another thread may have switched timing off
        ms, rejected = measure(candidates, start, arguments, timing or do_bench, launches=8 if key["few"] else 1)
    except TellsNothing:
        plan = None
    except torch.OutOfMemoryError:
        warnings.warn("set_autotune: out of memory while plans were timed; the table's plan runs", stacklevel=2)
        plan = candidates[0]
    else:
        plan = min(candidates, key=ms.get)
        if ms[candidates[0]] < GAIN * ms[plan] or math.isinf(ms[plan]):
            plan = candidates[0]  # if none can run the caller sees its error
        if ms[plan] < math.inf and not rejected:
            content = {"key": key, "plan": asdict(plan), "ms": ms[plan], "table_ms": ms[candidates[0]]}
            user_cache.write(_file(key), json.dumps(content, indent=1).encode())
    if arguments.get(SUMS) is not None:
        arguments[SUMS].zero_()
    if plan is not None:
        _fastest[_text(key)] = plan
    return plan


def measure(
    candidates: Sequence[Plan], start: Start, arguments: dict, ms_of: Callable, launches: int = 1
) -> tuple[dict[Plan, float], list[Plan]]:
    """Milliseconds of each plan, infinite if the GPU cannot run it; and those whose results are not the first one's.

    All are compiled and compared first, then timed twice in turn: the lesser time counts.

    Args:
        start: launches with a plan, and returns what launches the same again. arguments: of the kernel, by name. Its
            results are lost. ms_of: milliseconds that a function of no arguments takes. launches: timed at once, where
            one takes little longer than a clock can tell.
    Raises:
        TellsNothing: for results that do not tell a wrong plan from a right one.
    """
    sums = arguments.get(SUMS)
    results = {name: arguments[name] for name in (*WRITTEN, SUMS) if arguments.get(name) is not None}
    started, rejected, wanted = {}, [], None
    for plan in candidates:
        for name, result in results.items():
            result.zero_() if name == SUMS else result.fill_(math.nan)  # not written is wrong
        try:
            again = start(plan)
        except CANNOT_RUN:
            continue
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError
        ) as error:  # of the compiler or the driver, which a candidate may meet and the table's plan not
            if wanted is None:
                raise
            warnings.warn(f"set_autotune: {plan} does not run: {error}", stacklevel=2)
            continue
        if wanted is None:
            wanted = {name: result.clone() for name, result in results.items()}
            if not all((x.isfinite() & (x != 0 if name == SUMS else True)).any() for name, x in wanted.items()):
                raise TellsNothing
        wrong = [name.removesuffix("_ptr") for name in results if not agree(name, results[name], wanted[name])]
        if wrong:
            warnings.warn(f"set_autotune: {plan} gives another {', '.join(wrong)}: not taken", stacklevel=2)
            rejected.append(plan)
        else:
            started[plan] = again

    def call(again: Callable) -> None:
        for _ in range(launches):
            if sums is not None:
                sums.zero_()  # within the time, as in every backward: it leaves zeros in the cache
            again()

    ms = dict.fromkeys(candidates, math.inf)
    for _ in range(2):
        for plan, again in started.items():
            ms[plan] = min(ms[plan], ms_of(functools.partial(call, again)) / launches)
    return ms, rejected


def agree(name: str, got: Tensor, want: Tensor) -> bool:
    """Whether two plans' results are the same but for the order of their sums, which are float32 at least."""
    if not got.numel():
        return True
    acc = torch.promote_types(got.dtype, torch.float32)
    eps, eps_acc = torch.finfo(got.dtype).eps, torch.finfo(acc).eps
    got, want = got.to(acc), want.to(acc)
    if not torch.equal(got.isnan(), want.isnan()):
        return False  # what is not written is no jump
    # the largest number of a query's, or a pixel's, of which others of the batch know nothing
    scale = torch.where(want.isfinite(), want, 0).abs()
    scale = (
        scale.flatten(2).amax(2).view(*scale.shape[:2], *[1] * (scale.dim() - 2)) if scale.dim() > 2 else scale.max()
    )
    # off by a rounding of the dtype, and by what cancels out in a sum of some hundred terms
    close = (got - want).abs() <= 2 * eps * want.abs() + 1024 * eps_acc * scale
    other = got.numel() - (close | (got == want) | want.isnan()).sum().item()
    return other <= (_JUMPS * got.numel() if name in JUMPING else 0)


def key_of(kernel, kind: Kind, arguments: dict) -> dict:
    """What a plan that was timed is good for: a class of calls, a GPU, and the software that compiles for it."""
    return {
        **kind._asdict(),
        **{name: arguments[name] for name in _CONSTANTS},
        "dtypes": {name: str(x.dtype) for name, x in arguments.items() if isinstance(x, Tensor)},
        "device": _device_name(arguments["loc_ptr"].device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "msda_triton": __version__,
        "source": getattr(kernel, "cache_key", ""),  # of the kernel: a change to it is no new version yet
    }


@functools.cache
def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def _text(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def _file(key: dict) -> str:
    """One file for a class of calls: two processes never write into one another's."""
    return f"plan-{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


def _read(key: dict) -> Plan | None:
    content = user_cache.read(_file(key))
    if content is None:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(content)
        if found["key"] == key:
            return Plan(**found["plan"])
    warnings.warn(f"set_autotune: {user_cache.folder() / _file(key)} is damaged, and ignored", stacklevel=2)
    return None
