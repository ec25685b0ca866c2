"""What `test_gpu.py` does on a GPU, on one that is not there: what would be launched.

    TRITON_INTERPRET=0 python -m tests.gpu_rehearsal

Nothing is compiled, launched or computed: `benchmarks.fake_gpu` records the launches. Tensors of more than 2^31
elements are on the meta device, which has no memory.
"""

import torch
from torch import Tensor

from benchmarks import fake_gpu
from msda_triton import constants
from msda_triton.call import Call
from msda_triton.checks import plain_call
from msda_triton.kernels import launch
from msda_triton.kernels import plan as plans
from msda_triton.kernels.backward import _msda_bwd_kernel
from msda_triton.kernels.forward import _msda_fwd_kernel
from msda_triton.kernels.plan import CONFIGS
from tests import gpu_bodies as bodies

KERNELS = {kernel.fn.__name__: kernel for kernel in (_msda_fwd_kernel, _msda_bwd_kernel)}


def arguments(made: fake_gpu.Launch) -> dict:
    """A launch's arguments by their names."""
    return dict(zip(KERNELS[made.kernel].arg_names, made.arguments, strict=True))


def launches(fake, run) -> list[fake_gpu.Launch]:
    """What run launches."""
    fake.launches.clear()
    run()
    return list(fake.launches)


def cold_sizes(fake) -> None:
    """In a capture: no other kernel than with other sizes, and the numbers of the call, of which none is kept."""
    for form in bodies.FORMS.values():
        if form.method != "default":
            continue  # plain PyTorch
        before, image = bodies.fresh_sizes(), bodies.fresh_sizes()
        compiled = launches(fake, bodies.Body(form, False, before, form.warming, "cpu").launch)
        body = bodies.Body(form, False, image, form.points, "cpu")
        kept, captured = dict(constants._kept), []
        made = launches(fake, lambda: captured.append(bodies.capture(body.launch, "cpu")))  # noqa: B023
        assert constants._kept == kept
        assert [x.binary for x in made] == [x.binary for x in compiled] and len(made) == 2
        for x in made:
            given = arguments(x)
            assert given["shapes_ptr"].flatten().tolist() == [n for size in image for n in size]
            starts, points = given["starts_ptr"], given["num_points_ptr"]
            assert (starts is not None) == form.backwards and (points is not None) == (len(set(form.points)) > 1)
            assert starts is None or starts.tolist() == form.starts(image)
            assert points is None or points.tolist() == list(form.points)
            assert (given["BLOCK_W"] > 0) == (form.queries is None)  # rectangles
        assert len(captured[0].written) == 2 * (1 + form.backwards + (len(set(form.points)) > 1))


def large(fake) -> None:
    """Strides as they are, and as 64-bit integers where they take that: a kernel of its own."""
    for case in bodies.LARGE.values():
        compiled = []
        for gap in (2**31 - 1, case.gap) if case.gap else (0,):
            call, grad_out = large_call(case._replace(gap=gap), "meta")
            (B, S, M), strides = call.value.shape[:3], call.value.stride()[:3]
            assert (B - 1) * strides[0] + (S - 1) * strides[1] + (M - 1) * strides[2] > 2**31
            made = launches(fake, lambda: launch.forward(call))  # noqa: B023
            made += launches(fake, lambda: launch.backward(grad_out, call, [True, True, True, False]))  # noqa: B023
            for x in made:
                given = arguments(x)
                size = given["value_ptr"].itemsize // call.value.itemsize
                unit = given["STRIDE_UNIT"] * size
                assert given["S"] == S and size == 1 + (case.dtype == torch.bfloat16 and not gap)
                assert given["stride_vb"] * unit == (strides[0] if B > 1 else 0)
                assert (given["STRIDE_VS"] * size, given["stride_vm"] * unit) == strides[1:]
            compiled += [x.binary for x in made]
        assert len(set(compiled)) == len(compiled) == (4 if case.gap else 2)


def large_call(case: bodies.Large, device: str) -> tuple[Call, Tensor]:
    value = case.value(device)
    locations = torch.empty(case.B, 64, case.M, 2, 2, 2, device=device)
    call = plain_call(value, [(case.H, case.W), (3, 5)], locations, locations[..., 0])
    return call, torch.empty(case.B, 64, case.M * bodies.CHANNELS, dtype=case.dtype, device=device)


def edges(fake) -> None:
    """Every pixel is in one rectangle, and there are no others; each head and image has them."""
    for direction, configs in CONFIGS.items():
        for name in (None, *configs):
            for image in bodies.IMAGES.values():
                value, locations, weights = bodies.sampled(image, (4, 4, 4))
                locations, weights = locations.unflatten(3, (3, 4)), weights.unflatten(3, (3, 4))
                call, grad_out = plain_call(value, image, locations, weights), value.flatten(2)
                (made,) = launches(fake, lambda: bodies.attend(call, direction, name, grad_out))  # noqa: B023
                given, B, M = arguments(made), value.shape[0], value.shape[2]
                rows, W = given["BLOCK_Q"], given["BLOCK_W"]
                if W:
                    tiles = sum(-(-h // (rows // W)) * -(-w // W) for h, w in image)
                else:
                    tiles = -(-value.shape[1] // rows)
                config = name or plans.choose(plans.kind_of(call, direction), plans.architecture(value.device))
                assert (W == 0) == (configs[config].width == 0), config
                assert made.grid == (tiles, M, B), (name, image)


def streams(fake) -> None:
    """The current stream, whether a launch is made or found; two more are kept for each alignment."""
    stream, points = [7], (2, 2, 2)
    fake.get_current_stream = lambda device: stream[0]
    image = bodies.fresh_sizes()
    for off in (0, 1, 2, 4):
        body = bodies.Body(bodies.Form(points, points), False, image, points, "cpu", torch.bfloat16)
        body.inputs[0] = bodies.off_by(body.inputs[0], off)
        kept = []
        for _ in range(3):
            kept.append(len(launch._launches))
            stream[0] += 1
            assert [x.stream for x in launches(fake, body.launch)] == [stream[0]] * 2
        assert kept == [kept[0], kept[0] + 2, kept[0] + 2]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    fake = fake_gpu.install(compiling=False)
    parts = cold_sizes, large, edges, streams
    fake.record = True
    for part in parts:
        part(fake)
    print("rehearsed:", ", ".join(part.__name__ for part in parts))


if __name__ == "__main__":
    main()
