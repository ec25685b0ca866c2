"""The registered operators as PyTorch 2 sees them: opcheck, compile, export, functorch-free autograd."""

import functools

import pytest
import torch
from attention import gradients, make_inputs, reference
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from msda_triton import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused
from msda_triton.call import Call
from msda_triton.op import _of_an_operator

SHAPES = [(5, 7), (3, 4)]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_inputs(device, fused):
    value, locations, weights = make_inputs(SHAPES, B=1, Q=3, M=2, D=4, P=1, device=device)
    points = torch.rand(1, 3, 2, 4, device=device) if fused else None
    mask = torch.zeros(1, 47, dtype=torch.bool, device=device) if fused else None
    tensors = (value.detach(), torch.tensor(SHAPES, device=device), None, locations.detach().flatten(3, 4))
    return (*tensors, weights.detach().flatten(3, 4), [1, 1], [], [], points, mask)


def test_the_schemas_have_the_fields_of_a_call():
    operators = torch.ops.msda_triton
    kinds = ("forward", "backward", "fallback_forward", "fallback_backward")
    names = {kind: [x.name for x in getattr(operators, kind).default._schema.arguments] for kind in kinds}
    fields = list(Call._fields)
    assert names["forward"] == fields
    assert names["backward"] == ["grad_out", "needs", *fields]
    assert names["fallback_forward"] == fields[:8]
    assert names["fallback_backward"] == ["grad_out", "needs", *fields[:8]]


@pytest.mark.parametrize(
    "sizes", [[5, 7, 3, 4], [-6, -7, 1, 5], [47, 1], [5, 7, 3], [0] * 4, [6, 7, 1, 5, 0, 0]], ids=str
)
def test_sizes_that_nobody_checked(sizes, device):
    """Of an operator that is called directly: a query for each pixel or not, every query has its result."""
    value, locations, weights = (x.detach() for x in make_inputs(SHAPES, B=1, Q=47, M=2, D=4, P=1, device=device))
    inputs = value, torch.tensor(SHAPES, device=device), None, locations.flatten(3, 4), weights.flatten(3, 4), [1, 1]
    want = torch.ops.msda_triton.forward(*inputs, [], [], None, None)
    torch.testing.assert_close(torch.ops.msda_triton.forward(*inputs, sizes, [], None, None), want)


def test_an_operator_that_is_called_directly_says_what_is_missing(device):
    value, _, _, locations, weights, num_points, *_ = op_inputs(device, False)
    for sizes in ([], [5, 7, 3], [5, 7, 3, 4, 0, 0]):
        with pytest.raises(ValueError, match="level_sizes: expected 4 numbers, H and W of each level, or spatial_shap"):
            torch.ops.msda_triton.forward(value, None, None, locations, weights, num_points, sizes, [], None, None)
    elsewhere = torch.empty(2, 2, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match=f"spatial_shapes: expected on value's device {value.device}, got meta"):
        _of_an_operator((value, elsewhere, None, locations, weights, num_points))  # dispatched, it would be meta's
    shapes = torch.tensor(SHAPES, device=device)
    with pytest.raises(ValueError, match=f"grad_out: expected on value's device {value.device}, got meta"):
        _of_an_operator((value, shapes, None, locations, weights, num_points), torch.empty(1, 3, 8, device="meta"))


def test_an_operator_refuses_a_cpus_memory_without_the_interpreter(device, monkeypatch):
    inputs = op_inputs("cpu", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"value: expected on a GPU .* got cpu"):
        torch.ops.msda_triton.forward(*inputs)
    with pytest.raises(ValueError, match=r"value: expected on a GPU .* got cpu"):
        torch.ops.msda_triton.backward(torch.ones(1, 3, 8), [True] * 3 + [False], *inputs)


@pytest.mark.parametrize("kind", ["", "fallback_"])
def test_sizes_and_starts_in_any_memory(kind, device):
    """Of an operator that is called directly: every other number of the memory that holds them."""
    device = "cpu" if kind else device
    value, locations, weights = (x.detach() for x in make_inputs(SHAPES, B=1, Q=3, M=2, D=4, P=1, device=device))
    shapes, starts = torch.tensor(SHAPES, device=device), torch.tensor([12, 0], device=device)
    run = getattr(torch.ops.msda_triton, kind + "forward")
    rest = locations, weights, [1, 1], [], [], *([] if kind else [None, None])
    want = run(value, shapes, starts, *rest)
    apart = torch.full((2, 4), 9, device=device), torch.full((4,), 9, device=device)
    apart[0][:, ::2], apart[1][::2] = shapes, starts
    torch.testing.assert_close(run(value, apart[0][:, ::2], apart[1][::2], *rest), want)
    torch.testing.assert_close(want, ms_deform_attn(value, SHAPES, locations, weights, level_start_index=[12, 0]))


def asking_for_gradients(inputs):
    floats = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return tuple(x.clone().requires_grad_() if floats(x) else x for x in inputs)


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "requires-grad"])
@pytest.mark.parametrize("kind", ["plain", "fused", "fallback"])
def test_opcheck(kind, gradients, device):
    if kind == "fallback":
        device = "cpu"
    inputs = op_inputs(device, kind == "fused")
    forward, backward = torch.ops.msda_triton.forward.default, torch.ops.msda_triton.backward.default
    all_needs = [[True, True, True, kind == "fused"], [False, True, False, False], [True, False, False, False]]
    all_needs += [[False] * 4] if gradients else []
    if kind == "fallback":
        inputs, all_needs = inputs[:8], [needs[:3] for needs in all_needs]
        forward = torch.ops.msda_triton.fallback_forward.default
        backward = torch.ops.msda_triton.fallback_backward.default
    grad_out = torch.randn(1, 3, 8, device=device)
    prepare = asking_for_gradients if gradients else tuple
    torch.library.opcheck(forward, prepare(inputs), test_utils=CHECKS)
    for needs in all_needs:
        torch.library.opcheck(backward, prepare((grad_out, needs, *inputs)), test_utils=CHECKS)


@pytest.mark.parametrize("kind", ["plain", "fused", "fallback"])
def test_the_operators_have_derivatives_of_their_own(kind, device):
    """For graphs that hold them, torch.export's above all: there no autograd function of ours is left."""
    if kind == "fallback":
        device = "cpu"
    value, shapes, starts, locations, weights, num_points, *_, points, mask = op_inputs(device, kind == "fused")
    tensors = [value, locations, weights, *([points] if kind == "fused" else [])]
    tensors = [x.double().requires_grad_() for x in tensors]

    def run(value, locations, weights, *points):
        inputs = value, shapes, starts, locations, weights, num_points, [], []
        if kind == "fallback":
            return torch.ops.msda_triton.fallback_forward(*inputs)
        return torch.ops.msda_triton.forward(*inputs, *(points or [None]), mask)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("form", ["tensor", "list"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compile_fullgraph_with_dynamic_sizes(backend, form, device):
    """One compilation serves every image size, forward and backward, without a graph break."""
    torch._dynamo.reset()
    compilations = []

    def count(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    function = torch.compile(
        lambda v, s, x, a: ms_deform_attn(v, s, x, a, backend=backend), fullgraph=True, dynamic=True, backend=count
    )
    for shapes, Q in ([(5, 7), (3, 4)], 5), ([(6, 4), (2, 2)], 9), ([(9, 9), (5, 5)], 106):
        inputs = make_inputs(shapes, Q=Q, D=8, device=device)
        sizes = torch.tensor(shapes, device=device) if form == "tensor" else shapes
        got = gradients(lambda v, x, a, s=sizes: function(v, s, x, a), inputs, torch.ones(2, Q, 16, device=device))
        want = gradients(lambda v, x, a, s=shapes: reference(v, s, x, a), inputs, torch.ones(2, Q, 16, device=device))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert len(compilations) == 1


@pytest.mark.parametrize("form", ["plain", "fused", "listed points", "starts", "discrete"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_compiled_graph_has_no_constants_and_no_copies(backend, form, device):
    """Sizes that the host knows are integers in it: copied from the host, they would make each layer wait.

    A constant on the host would also make mode="reduce-overhead" give up CUDA graphs.
    """
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append([node for node in graph.graph.nodes if node.op not in ("placeholder", "output")])
        return make_boxed_func(graph.forward)

    options = {"backend": backend}
    if form == "starts":
        options["level_start_index"] = [12, 0]
    if form == "discrete":
        options["method"] = "discrete"
    shapes = [(5, 7), (3, 4)]
    value, locations, weights = make_inputs(shapes, B=1, Q=3, M=2, D=8, P=2, device=device)
    points = torch.rand(1, 3, 2, 4, device=device, requires_grad=True)
    if form == "listed points":
        locations, weights = (x.flatten(3, 4)[:, :, :, :3].detach().requires_grad_() for x in (locations, weights))
        options["num_points"] = [1, 2]

    def function(value, points, locations, weights):
        if form == "fused":
            return ms_deform_attn_fused(value, shapes, points, locations, weights, **options)
        return ms_deform_attn(value, shapes, locations, weights, **options)

    inputs = (value, points, locations, weights)
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep))):
        leaves = [x for x in inputs if x is not points or form == "fused"]
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    forward, backward = ([str(node.target) for node in graph] for graph in graphs)
    assert not [name for name in forward + backward if "lift" in name or "device_put" in name]
    assert not [node for graph in graphs for node in graph if node.op == "get_attr"]
    an_operator = form != "discrete" and (backend == "triton" or device == "cpu")  # the rest is plain PyTorch
    if an_operator:  # floats of the formula become indices
        assert not [name for name in forward + backward if "_to_copy" in name]
    assert not [
        node for graph in graphs for node in graph if "_to_copy" in str(node.target) and "device" in node.kwargs
    ]
    if an_operator:
        kind = {"triton": "", "torch": "fallback_"}[backend]
        for names, direction in ((forward, "forward"), (backward, "backward")):
            assert [name for name in names if "msda" in name] == [f"msda_triton.{kind}{direction}.default"]
        (node,) = (node for node in graphs[0] if "msda" in str(node.target))
        assert list(node.args[6]) == [5, 7, 3, 4] and node.args[1] is None and node.args[2] is None


@pytest.mark.parametrize(("compiler", "backend"), [("aot_eager", "auto"), ("inductor", "auto"), ("inductor", "triton")])
def test_compile_the_module(compiler, backend, device):
    """Inductor believes the strides that the operators' fakes promise, and asserts them."""
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=2, backend=backend).to(device)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    query, source = torch.randn(2, 5, 16, device=device), torch.randn(2, 47, 16, device=device, requires_grad=True)
    points, shapes = torch.rand(2, 5, 2, 2, device=device), torch.tensor(SHAPES, device=device)
    grads = []
    for run in (module, compiled):
        out = run(query, points, source, shapes)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [source, *module.parameters()])))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "method", "case"),
    [
        *(("torch", "default", case) for case in ("not finite", "B = 0", "Q = 0", "empty level")),
        *(("torch", "discrete", case) for case in ("finite", "not finite")),
        ("triton", "default", "not finite"),
        ("triton", "discrete_h", "empty level"),
    ],
)
def test_compiled_edge_cases(backend, method, case, device):
    """Each has an answer without a graph, and the same one with it."""
    shapes = [(5, 7), (0, 4)] if case == "empty level" else SHAPES
    B, Q = (0, 5) if case == "B = 0" else (2, 0) if case == "Q = 0" else (2, 5)
    inputs = make_inputs(shapes, B=B, Q=Q, D=8, device=device)
    if case == "not finite":
        with torch.no_grad():
            inputs[1][0, 0, 0, 0, 0, 0], inputs[1][1, 1, 1, 1, 1, 1] = float("nan"), float("inf")
    function = lambda v, x, a: ms_deform_attn(v, shapes, x, a, method=method, backend=backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    grad_out = torch.randn(B, Q, 16, device=device)
    for got, want in zip(gradients(compiled, inputs, grad_out), gradients(function, inputs, grad_out), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_export(backend, device):
    """The exported graph gives the module's result, and trains as the module does."""
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=2, backend=backend).to(device)
    arguments = (
        torch.randn(2, 5, 16, device=device),
        torch.rand(2, 5, 2, 2, device=device),
        torch.randn(2, 47, 16, device=device),
        torch.tensor(SHAPES, device=device),
    )
    exported = torch.export.export(module, arguments).module()
    torch.testing.assert_close(exported(*arguments), module(*arguments), rtol=1e-5, atol=1e-6)
    for run in (module, exported):
        run(*arguments).square().sum().backward()
    wanted = dict(module.named_parameters())
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["torch", "triton", "discrete", "exported"])
def test_a_pixels_gradients_are_not_added_up_in_half_precision(kind, dtype, device):
    """4096 ones give 4096, half of them by each of two corners: in bfloat16 they gave 256."""

    class Model(torch.nn.Module):
        def forward(self, value, locations, weights):
            options = {"method": "discrete"} if kind == "discrete" else {}
            if kind in ("torch", "triton"):
                options["backend"] = kind
            return ms_deform_attn(value, [(1, 2)], locations, weights, **options)

    value = torch.ones(1, 2, 1, 1, dtype=dtype, device=device, requires_grad=True)
    locations = torch.full((1, 4096, 1, 1, 1, 2), 0.5, device=device)
    weights = torch.ones(1, 4096, 1, 1, 1, dtype=dtype, device=device)
    model = Model()
    if kind == "exported":
        model = torch.export.export(model, (value, locations, weights)).module()
    model(value, locations, weights).backward(torch.ones(1, 4096, 1, dtype=dtype, device=device))
    assert value.grad.flatten().tolist() == ([0, 4096] if kind == "discrete" else [2048, 2048])


@pytest.mark.parametrize("kind", ["torch", "triton", "exported"])
@pytest.mark.parametrize("order", [1, 2])
def test_no_part_of_a_pixels_gradient_is_rounded_to_half_precision(order, kind, device, monkeypatch):
    """The second pixel gets 120000 and -60000 by different corners: infinite in float16, their sum is not."""
    if kind == "exported":
        monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    backend = "triton" if kind == "triton" else "torch"
    value = torch.ones(1, 2, 1, 1, dtype=torch.float16, device=device, requires_grad=True)
    locations = torch.tensor([[0.5, 0.5], [0.75, 0.5]], device=device).view(1, 2, 1, 1, 1, 2)
    weights = torch.tensor([4.0, 1.0], device=device).view(1, 2, 1, 1, 1).requires_grad_()
    out = ms_deform_attn(value, [(1, 2)], locations, weights, backend=backend)
    grad_out = torch.tensor([60000.0, -60000.0], dtype=torch.float16, device=device).view(1, 2, 1)
    if order == 1:
        (got,) = torch.autograd.grad(out, value, grad_out)
    else:  # the same sums, as derivative of the gradient of the weights
        (first,) = torch.autograd.grad(out, weights, grad_out, create_graph=True)
        (got,) = torch.autograd.grad((first * weights.detach()).sum(), value)
    assert got.flatten().tolist() == [float("inf"), 60000.0]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_derivatives_of_every_order(fused, device):
    """The third order, by the differences of the second: of a first derivative, PyTorch's check of second ones."""
    value, locations, weights = make_inputs(
        [(2, 2)], B=1, Q=1, M=1, D=1, P=2, dtype=torch.float64, device=device, span=0.4
    )
    inputs = [value, locations, weights]
    if fused:
        inputs = [
            value,
            torch.full((1, 1, 1, 4), 0.5, dtype=torch.float64, device=device, requires_grad=True),
            *inputs[1:],
        ]

    def first(*inputs):
        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        if fused:
            out = ms_deform_attn_fused(inputs[0], [(2, 2)], *inputs[1:])
        else:
            out = ms_deform_attn(inputs[0], [(2, 2)], *inputs[1:])
        return torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(first, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_derivative_by_one_input_that_depends_on_another(backend, device):
    """Weights and locations come out of the same tensor: a second derivative must not take one way for the other."""
    source = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)

    def run(source, attend):
        value = (source[0] * torch.arange(1.0, 5.0, dtype=torch.float64, device=device)).view(1, 4, 1, 1)
        locations = (source[:2] * 0.2 + 0.4).view(1, 1, 1, 1, 1, 2)
        return attend(value, [(2, 2)], locations, source[2:].view(1, 1, 1, 1, 1)).pow(2).sum()

    results = []
    for attend in (functools.partial(ms_deform_attn, backend=backend), reference):
        derivative, derivatives = run(source, attend), []
        for _ in range(4):
            (derivative,) = torch.autograd.grad(derivative.sum(), source, create_graph=True)
            derivatives.append(derivative)
        results.append(derivatives)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forward_mode_is_refused_and_not_zero(backend, device):
    value, locations, weights = (x.detach() for x in make_inputs(SHAPES, B=1, Q=2, M=1, D=4, device=device))
    run = lambda v: ms_deform_attn(v, SHAPES, locations, weights, backend=backend)  # noqa: E731
    if backend == "torch" and device != "cpu":  # plain PyTorch, which has one; out is linear in value
        torch.testing.assert_close(*torch.func.jvp(run, (value,), (value,)))
        return
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(run, (value,), (value,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            run(torch.autograd.forward_ad.make_dual(value, value))
        assert run(value).shape == (1, 2, 4)
        out = run(value.requires_grad_())
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.autograd.grad(out, value, torch.autograd.forward_ad.make_dual(out.detach(), out.detach()))
    compiled = torch.compile(lambda v: torch.func.jvp(run, (v,), (v,))[1], backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="no forward-mode derivative"):
        compiled(value.detach())


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every size that it keeps
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_a_trace_keeps_no_size_and_no_content(method, device):
    """torch.jit.trace, with other sizes, and with locations that are not finite, than those that it saw."""
    value, locations, weights = (x.detach() for x in make_inputs([(3, 4), (2, 2)], B=1, Q=3, M=1, D=4, device=device))
    function = lambda v, x, a, s: ms_deform_attn(v, s, x, a, method=method, backend="torch")  # noqa: E731
    first, second = (torch.tensor(s, device=device) for s in ([(3, 4), (2, 2)], [(2, 2), (3, 4)]))
    traced = torch.jit.trace(function, (value, locations, weights, first))
    other = locations.clone()
    other[0, 0, 0, 0, 0, 0] = float("nan")
    for inputs in ((value, locations, weights, second), (value, other, weights, first)):
        torch.testing.assert_close(traced(*inputs), function(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_derivatives_under_autocast_are_those_without_it(method, dtype, device):
    """First and second order, forward and backward: autocast is for a model's layers."""
    shapes = [(2, 3), (9, 9)]  # a level of few tokens is a matrix product in the fallback
    inputs = make_inputs(shapes, B=1, Q=7, M=2, D=8, device=device)
    grad_out = torch.randn(1, 7, 16, device=device, requires_grad=True)

    def derivatives():
        out = ms_deform_attn(inputs[0], shapes, *inputs[1:], method=method)
        first = torch.autograd.grad(out, inputs, grad_out, create_graph=True)
        sums = sum(x.square().sum() for x in first if x.requires_grad)
        return out, *first, *torch.autograd.grad(sums, (grad_out, *inputs), materialize_grads=True, allow_unused=True)

    want = derivatives()
    with torch.autocast(device, dtype=dtype):
        got = derivatives()
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_no_graph_waits_for_the_device(device):
    """Traced with fake tensors: anything that reads a tensor's content would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = (2, 47, 2, 8), (2, 5, 2, 2, 2, 2), (2, 5, 2, 2, 2)
    with FakeTensorMode():
        value, locations, weights = (torch.empty(size, device=device) for size in sizes)
        shapes = torch.empty(2, 2, dtype=torch.long, device=device)
        torch.ops.msda_triton.forward(
            value, shapes, None, locations.flatten(3, 4), weights.flatten(3, 4), [2, 2], [], [], None, None
        )
