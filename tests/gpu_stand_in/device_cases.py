"""Each check of the device, with a case that it must catch and one that it must let pass.

Not collected by itself: test_device.py runs it in a process of its own, where the stand-in is in place.
"""

import copy
import io
from collections import Counter

import pytest
import torch
from torch.nn import functional

from tests.gpu_stand_in.device import H200, recording, without_values
from tests.gpu_stand_in.log import AUTOGRAD, BYTE, COPY, KINDS, LAUNCH, WAIT

HERE = "tests/gpu_stand_in/device_cases.py"
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]


def ones(*shape, **options):
    return torch.ones(*shape, device="cuda", **options)


def asked(function):
    """(waits, copies, launches, bytes) of a call."""
    with recording() as log:
        function()
    return tuple(log.total(kind) for kind in KINDS)


# -- devices -----------------------------------------------------------------------------------------------------------

MIXED = {
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.add_(b),
    "matmul": lambda a, b: a @ b,
    "cat": lambda a, b: torch.cat([a, b]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.5),
    "conv": lambda a, b: functional.conv2d(a[None, None], b[None, None]),
    "index_add": lambda a, b: a.index_add(0, torch.tensor([0], device="cuda"), b[:1]),
    "gather": lambda a, b: a.gather(0, b.long()),
    "foreach": lambda a, b: torch._foreach_add_([a], [b]),
    "of the host's result": lambda a, b: torch.add(a, a, out=b),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(name):
    a, b = ones(3, 3), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="device"):
        MIXED[name](a, b)


def test_numbers_of_the_host_are_taken():
    total = ones(3) + torch.tensor(2.0)
    assert total.is_cuda and total.tolist() == [3, 3, 3]


def test_memory_of_the_device_is_no_array():
    with pytest.raises(TypeError, match="cuda"):
        ones(3).numpy()


def test_it_passes_for_an_h200():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.get_device_name() == H200.name and torch.cuda.get_device_capability() == (9, 0)
    assert ones(1).device == torch.device("cuda", 0) == torch.ones(1).cuda().device
    with torch.cuda.device(0):
        assert torch.cuda.current_device() == 0


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_what_nobody_has_written_shows(dtype):
    fresh = torch.empty(5, dtype=dtype, device="cuda")
    assert fresh.isnan().all() if dtype in FLOATS else (fresh == -1).all()


def test_a_result_of_memory_that_is_half_written_is_not_a_number():
    half = torch.empty(4, device="cuda")
    half[:2] = 1
    assert half.sum().isnan() and not half[:2].sum().isnan()


def test_allocations_are_counted_in_granules():
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first, second = torch.empty(1, device="cuda"), torch.empty(129, device="cuda")
    assert torch.cuda.memory_allocated() - before == 512 + 1024
    del second
    assert torch.cuda.memory_allocated() - before == first.numel() * 512
    assert torch.cuda.max_memory_allocated() - before == 512 + 1024
    assert torch.cuda.mem_get_info() == (H200.total_memory - before - 512, H200.total_memory)


def test_results_of_operations_are_allocations():
    x, before = ones(256), torch.cuda.memory_allocated()
    y = x * 2
    assert torch.cuda.memory_allocated() - before == 1024 and y.is_cuda
    view = x.view(2, 128)[1]
    assert torch.cuda.memory_allocated() - before == 1024 and view.data_ptr() == x.data_ptr() + 512


# -- waits -------------------------------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0]),
    "int": lambda x: int(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "copy to pageable memory": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "blocking copy to pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x),
    "to the device": lambda x: torch.ones(3).cuda(),
    "from pinned memory, blocking": lambda x: torch.ones(3, pin_memory=True).cuda(),
    "tensor of a list": lambda x: torch.tensor([1.0], device="cuda"),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 0],
    "index by a list": lambda x: x[torch.tensor([0, 1])],
    "assign by a mask": lambda x: x.__setitem__(x > 0, ones(3)),
    "assign by a list": lambda x: x.__setitem__(torch.tensor([0, 1]), ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device="cuda")),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_once(name):
    x = ones(3)
    with recording() as log:
        WAITS[name](x)
    assert log.table(WAIT) == {f"{HERE}:<lambda>": 1}, log.lines(WAIT)


PASSES = {
    "sum": lambda x: x.sum(),
    "where": lambda x: torch.where(x > 0, x, -x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2),
    "index": lambda x: x[torch.arange(2, device="cuda")],
    "assign by indices": lambda x: x.__setitem__(torch.arange(2, device="cuda"), ones(2)),
    "assign one number by a mask": lambda x: x.__setitem__(x > 0, 2.0),
    "shape": lambda x: (x.shape, x.is_pinned(), x.view(1, 3).t()),
    "copy on the device": lambda x: x.clone().copy_(x),
    "scalar": lambda x: x * 3.0 + torch.tensor(2.0),
    "full": lambda x: torch.full((3,), 2.0, device="cuda"),
    "event": lambda x: torch.cuda.Event().record(),
    "norm": lambda x: torch.nn.utils.get_total_norm([x, x]),
}


@pytest.mark.parametrize("name", PASSES)
def test_the_host_does_not_wait(name):
    x = ones(3)
    waits, copies, *_ = asked(lambda: PASSES[name](x))
    assert (waits, copies) == (0, 0)


def test_copies_that_nobody_waits_for():
    x, pinned = ones(3), torch.ones(3, pin_memory=True)
    assert pinned.is_pinned() and not torch.ones(3).is_pinned()

    def copies():
        return x.copy_(pinned, non_blocking=True), pinned.copy_(x, non_blocking=True), x.to("cpu", non_blocking=True)

    with recording() as log:
        copies()
        x.copy_(torch.ones(3), non_blocking=True)
    assert log.total(WAIT) == 0 and log.total(COPY) == 4
    assert sum("pageable" in line for line in log.lines(COPY)) == 1


def test_nothing_is_logged_outside():
    with recording() as log:
        ones(3).sum()
    before = log.total(LAUNCH)
    ones(3).sum().item()
    assert log.total(LAUNCH) == before and log.total(WAIT) == 0


# -- launches ----------------------------------------------------------------------------------------------------------

LAUNCHES = {
    "add": (1, lambda x: x + x),
    "in place": (1, lambda x: x.add_(1)),
    "sum of a product": (2, lambda x: (x * x).sum()),
    "view": (0, lambda x: x.view(2, 2).t()[1:].unsqueeze(0)),
    "chunks": (0, lambda x: x.chunk(2)),
    "empty": (0, lambda x: torch.empty_like(x)),
    "zeros": (1, lambda x: torch.zeros_like(x)),
    "contiguous": (1, lambda x: x.view(2, 2).t().contiguous()),
    "contiguous already": (0, lambda x: x.contiguous()),
    "cast": (1, lambda x: x.to(torch.bfloat16)),
    "foreach": (1, lambda x: torch._foreach_mul_([x, x, x], 2.0)),
    "silu": (1, functional.silu),
    "group norm": (1, lambda x: functional.group_norm(x.view(1, 4, 1), 2)),
    "convolution": (1, lambda x: functional.conv1d(x[None, None], x[None, None, :1])),
    "copy to the host": (0, lambda x: x.cpu()),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_counted(name):
    expected, function = LAUNCHES[name]
    x = ones(4)
    assert asked(lambda: function(x))[2] == expected


BYTES = {
    "add": (3 * 16, lambda x: x + x),
    "in place": (2 * 16, lambda x: x.add_(1)),
    "copy": (2 * 16, lambda x: x.clone()),
    "cast": (16 + 8, lambda x: x.to(torch.bfloat16)),
    "sum": (16 + 4, lambda x: x.sum()),
    "view": (0, lambda x: x.view(2, 2).t()),
    "foreach": (2 * 32, lambda x: torch._foreach_mul_([x, x.detach()], 2.0)),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_what_an_operation_reads_and_writes(name):
    expected, function = BYTES[name]
    x = ones(4)
    assert asked(lambda: function(x))[3] == expected


def convolve(last, bias):
    """Output and gradients of a convolution [2, 4, 8, 8] -> [2, 6, 8, 8] in fp32, and the log."""
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (torch.randn(size, generator=generator).cuda() for size in ((2, 4, 8, 8), (6, 4, 3, 3), (6,)))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    parameters = [each.requires_grad_() for each in ((x, weight, shift) if bias else (x, weight))]
    with recording() as log:
        y = functional.conv2d(*parameters, padding=1)
        gradients = torch.autograd.grad(y, parameters, torch.empty_like(y).fill_(1))
    return [y.detach(), *gradients], log


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_cudnn_adds_to_a_convolution(last, bias):
    _, log = convolve(last, bias)
    passes = Counter()
    for (kind, what, _), size in log.operations.items():
        if kind == BYTE and what.startswith("cudnn"):
            passes[what] += size
    output, weight = 4 * 2 * 6 * 64, 4 * 6 * 4 * 9
    expected = {"cudnn::add bias": 2 * output, "cudnn::sum bias gradient": output} if bias else {}
    if last:  # to its layout and back; read and written, once for each pass
        expected |= {"cudnn::weight to channels_last": 4 * weight, "cudnn::gradient to the weight's layout": 2 * weight}
    assert passes == expected


@pytest.mark.parametrize("last", [False, True])
def test_without_values_shapes_and_counts_are_the_same(last):
    with_values, expected = convolve(last, True)
    with without_values():
        found, log = convolve(last, True)
    assert log.counts == expected.counts
    for a, b in zip(found, with_values, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    assert not any(each.isnan().any() for each in with_values) and found[0].isnan().all()


def test_launches_of_the_backward_pass_are_autograd_s():
    x = ones(4, requires_grad=True)
    loss = (x * x).sum()
    with recording() as log:
        loss.backward()
    assert log.counts[LAUNCH, AUTOGRAD] >= 2 and log.total(WAIT) == 0


class Waiting(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 1

    @staticmethod
    def backward(context, gradient):
        return gradient * gradient[0].item()


def test_a_wait_in_a_backward_of_ours_has_its_place():
    loss = Waiting.apply(ones(4, requires_grad=True)).sum()
    with recording() as log:
        loss.backward()
    assert log.table(WAIT) == {f"{HERE}:Waiting.backward": 1}


# -- results -----------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 1)]
    return torch.nn.Sequential(*layers)


def test_a_step_of_training_equals_the_cpu_s():
    results = []
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for device in ("cpu", "cuda"):
        net = network().to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters())
        loss = net(x.to(device)).square().mean()
        loss.backward()
        optimizer.step()
        results.append([loss.detach().cpu(), *(part.detach().cpu() for part in net.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_its_formula(dtype):
    q, k, v = (torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    expected_inputs = [part.double().requires_grad_() for part in (q, k, v)]
    inputs = [part.to("cuda", dtype).requires_grad_() for part in (q, k, v)]
    q, k, v = expected_inputs
    expected = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v
    out = functional.scaled_dot_product_attention(*inputs)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), expected_inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), right.detach(), rtol=tolerance, atol=4 * tolerance)


def test_shapes_change_in_place():
    x = ones(2, 3)
    assert x.t_().shape == (3, 2) and x.unsqueeze_(0).shape == (1, 3, 2) and x.squeeze_().shape == (3, 2)
    assert x.resize_(4, 4).shape == (4, 4) and x.flatten()[:6].eq(1).all()
    out = torch.empty(0, device="cuda")
    assert torch.add(x, x, out=out) is out and out.shape == (4, 4) and out.is_cuda
    assert torch.sort(ones(3)).values.is_cuda and ones(3).max(0).indices.is_cuda


def test_views_share_memory():
    x = torch.zeros(4, device="cuda")
    x.view(2, 2)[1].fill_(3)
    x.chunk(2)[0].add_(1)
    assert x.tolist() == [1, 1, 3, 3]


def test_deep_copies_and_files():
    x = ones(3)
    copied = copy.deepcopy(torch.nn.Parameter(x))
    copied.data.zero_()
    assert x.sum() == 3 and copied.is_cuda
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.load(file, map_location="cpu")["x"].tolist() == [1, 1, 1]
