"""backend="inductor": the numbers of the specification, one compilation for all image sizes, and clear errors."""

import pytest
import torch
import torch._inductor.config
from test_fallback import check, computed, grad_like, make_inputs

from msda_triton.call import Call
from msda_triton.cpu import inductor
from msda_triton.cpu.inductor import inductor_backward, inductor_forward


def test_equals_the_fallback_and_compiles_once():
    torch._dynamo.reset()
    inductor._compiled.cache_clear()
    counters = torch._dynamo.utils.counters
    for levels, Q in (([(7, 5), (2, 2)], 5), ([(4, 9), (3, 3)], 12), ([(2, 3), (5, 5)], 33)):
        inputs = make_inputs(levels=levels, points=(2, 2), Q=Q, dtype=torch.float32)
        grad_out = grad_like(inputs)
        got = inductor_forward(Call(*inputs)), *inductor_backward(grad_out, Call(*inputs), (True, True, True))
        if Q == 5:
            compiled = counters["stats"]["unique_graphs"]
            assert compiled >= 2
        for mine, eager in zip(got, computed(inputs, grad_out), strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)
        check(inputs, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == compiled


def test_not_a_cpu():
    inputs = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in make_inputs()]
    with pytest.raises(ValueError, match=r"value: backend='inductor' is for tensors on a CPU, got one on meta"):
        inductor_forward(Call(*inputs))
    with pytest.raises(ValueError, match="on meta"):
        inductor_backward(torch.empty(2, 5, 24, device="meta"), Call(*inputs), (True, True, True))


def test_no_compiler():
    inductor._compiled.cache_clear()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with no_compiler, pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        inductor_forward(Call(*make_inputs()))


@pytest.mark.parametrize("where", [0, 3, 4], ids=["value", "locations", "weights"])
def test_what_is_not_finite(where):
    inputs = make_inputs()
    inputs[where].view(-1)[0] = torch.nan
    grad_out = grad_like(inputs)
    needs = (True, True, True)
    got = inductor_forward(Call(*inputs)), *inductor_backward(grad_out, Call(*inputs), needs)
    for mine, eager in zip(got, computed(inputs, grad_out), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-10, atol=1e-12, equal_nan=True)
