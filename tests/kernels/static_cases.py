"""What the ahead-of-time gate compiles: specialisations of every kernel, as its launcher would ask for them.

There is one for every branch of a launcher's heuristics at real shapes and dtypes; ``python -m benchmarks.static``
compiles them for every architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rdmd_fast.kernels import _group_norm_silu as norm_kernels
from rdmd_fast.kernels import _merge, denoising_loss, ema_update, image_normalize, noise_forward, philox, rdmd_gradient
from rdmd_fast.kernels import scaled_residual as residual
from rdmd_fast.kernels.group_norm_silu import Plan, plan_chunks, plan_merge, plan_resident
from rdmd_fast.kernels.noise_forward import chunk_count, tile_of

# Samples that reach every branch of tile_of: a point, an image of 8x8, one of 64x64.
SAMPLES = {"2": 2, "3x8x8": 192, "3x64x64": 12288}
NOISE = {"seed": "*i64", "positions": "*i64", "drawn": None}
READING = {"skip": "fp32", "scale": "fp32"}
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class StaticCase:
    """One specialisation of a Triton kernel.

    Attributes:
        name: unique, such as ``noise_forward/bf16/3x64x64``.
        kernel: the function that ``_dispatch.jit`` made.
        signature: every argument in order, by name, to its Triton type (``*fp32``, ``*bf16``, ``*i64``, ``i32``,
            ``fp32``) or ``constexpr``.
        constants: values of the ``constexpr`` arguments.
        divisible_by_16: arguments known to be multiples of 16: pointers to aligned memory, and the sizes and
            strides that are so at these shapes. What the launcher's own specialisation would see.
        num_warps: as launched.
        vector_pointers: 16-byte global accesses must appear, loads and stores alike where the kernel has both.
        num_stages: as launched.
        enable_fp_fusion: as launched; False in every kernel that draws noise.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    vector_pointers: bool = True
    num_stages: int = 3
    enable_fp_fusion: bool = False


def case(
    name: str, kernel, types: Mapping[str, str | None], constants: Mapping[str, Any], multiples=(), **launched
) -> StaticCase:
    """A case whose pointers are aligned.

    Args:
        types: Triton types by argument, None for an absent one; an argument without a type is an ``i32``.
        constants: values of the ``constexpr`` arguments.
        multiples: numbers that are multiples of 16.
        launched: further attributes of ``StaticCase``.
    """
    constants = {**{argument: None for argument in kernel.arg_names if types.get(argument, "") is None}, **constants}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    return StaticCase(name, kernel, signature, constants, (*pointers, *multiples), **launched)


def case_of_samples(name: str, kernel, elements: int, types: dict, vectors: bool = True, **constants) -> StaticCase:
    """A kernel that ``noise_forward.launch`` runs, at samples of ``elements``."""
    rows, width = tile_of(elements)
    even = elements % 16 == 0
    constants = {"ROWS": rows, "WIDTH": width, **constants}
    return case(name, kernel, types, constants, ("count",) * even, vector_pointers=vectors and even)


def denoising_loss_cases() -> Iterator[StaticCase]:
    """Each sample size and dtype of the network."""
    for shape, elements in SAMPLES.items():
        for kind in DTYPES:
            if shape == "3x64x64" or kind == "bf16":
                types = {"losses": "*fp32", "clean": "*fp32", "table": "*fp32", **NOISE, "factor": "fp32"}
                types |= {"gradient": f"*{kind}", "output": f"*{kind}"}
                name = f"denoising_loss/{kind}/{shape}"
                yield case_of_samples(name, denoising_loss._denoising_kernel, elements, types)


def ema_update_cases() -> Iterator[StaticCase]:
    """Both branches of the formula."""
    for name, from_source in (("small_weight", False), ("large_weight", True)):
        types = {"table": "*i64", "coefficient": "fp32"}
        constants = {"FROM_SOURCE": from_source, "ALIGNED": True, "BLOCK": ema_update.BLOCK}
        # Addresses out of a table cannot be followed; test_ema_update.py looks at the whole code.
        launched = {"num_warps": 8, "vector_pointers": False}
        yield case(f"ema_update/{name}", ema_update._ema_update_kernel, types, constants, **launched)


def group_norm_silu_cases() -> Iterator[StaticCase]:
    """Every branch at shapes of SongUNet and ADM (channels, pixels, groups), in the layout and dtypes of training."""
    sizes = {"bf16": 2, "fp32": 4}

    def norm_case(kernel, plan: Plan, shape: str, dtype: str, modulated: bool, **constants) -> StaticCase:
        own = ("x", "y", "dy", "branch", "dx", "weight", "bias", "x_bias", "scale", "shift", "addend", "modulation")
        types = dict.fromkeys(own, f"*{dtype}") | dict.fromkeys(
            ("addend", "branch") if modulated else ("scale", "shift")
        )
        types |= {"eps": "fp32", **dict.fromkeys(("table", "partials", "contributions", "slopes"), "*fp32")}
        name = f"group_norm_silu/{kernel.__name__.removesuffix('_kernel')}/{dtype}/{shape}"
        wide = "table_kernel" not in kernel.__name__
        launched = {"num_warps": plan.warps, "vector_pointers": wide, "enable_fp_fusion": True}
        return case(name, kernel, types, {**plan.tile, **constants}, **launched)

    resident = [(256, 256, 32, True, "bf16"), (256, 1024, 32, True, "bf16"), (128, 64, 32, True, "fp32")]
    resident += [(512, 64, 32, True, "bf16"), (256, 256, 32, False, "bf16")]
    for channels, pixels, groups, last, dtype in resident:
        shape = f"{channels}x{pixels}{'' if last else '/contiguous'}"
        sharing = 2 if channels == 128 else sizes[dtype]  # the modulated norm has no other branch
        kernels = (1, norm_kernels.resident_forward_kernel), (sharing, norm_kernels.resident_backward_kernel)
        for tensors, kernel in kernels:
            plan = plan_resident((8, channels, pixels), groups, sizes[dtype], last, tensors)
            # A norm that takes a convolution's bias is not one that branches.
            constants = {"X_BIAS": channels == 128} if "backward" in kernel.__name__ else {}
            yield norm_case(kernel, plan, shape, dtype, channels == 128, SILU=True, **constants)
    chunked = [(128, 4096, 32, True, "bf16"), (384, 65536, 32, True, "bf16"), (192, 4096, 32, True, "fp32")]
    chunked += [(128, 4096, 32, False, "bf16")]
    for channels, pixels, groups, last, dtype in chunked:
        rest = f"{channels}x{pixels}{'' if last else '/contiguous'}", dtype, channels == 192
        forward, backward = (plan_chunks((8, channels, pixels), last, elements) for elements in (2048, 1024))
        tile, warps = plan_merge(channels // groups, forward.grid[0] // 8)
        merge = Plan(tile, (8, groups), warps)
        yield norm_case(norm_kernels.moments_kernel, forward, *rest)
        yield norm_case(norm_kernels.apply_kernel, forward, *rest, SILU=True)
        yield norm_case(norm_kernels.gradient_sums_kernel, backward, *rest, SILU=True)
        yield norm_case(norm_kernels.gradient_apply_kernel, backward, *rest, SILU=True)
        if last:
            chunk = forward.tile["TILE_P"] * forward.tile["STEPS"]
            yield norm_case(norm_kernels.table_kernel, merge, *rest, CHUNK=chunk)
            yield norm_case(norm_kernels.gradient_table_kernel, merge, *rest, X_BIAS=True)


def image_normalize_cases() -> Iterator[StaticCase]:
    """Training batches at 64x64 in each dtype, with and without flips."""
    for dtype, flip in (("fp32", False), ("bf16", False), ("bf16", True)):
        counters = dict.fromkeys(("seed", "positions"), "*i64" if flip else None)
        types = {"images": "*u8", "out": f"*{dtype}", **counters}
        constants, _, _ = image_normalize._constants((8, 3, 64, 64), flip)
        name = f"image_normalize/{dtype}{'/flip' if flip else ''}"
        yield case(name, image_normalize._image_normalize_kernel, types, constants)


def noise_forward_cases() -> Iterator[StaticCase]:
    """Each sample size, from y and from F_G, in fp32, bf16 and fp16; once with x_t, once with noise drawn ahead."""
    common = {"table": "*fp32", **NOISE, **READING, "y": None, "state": None, "x": None, "clean": "*fp32"}
    variants = {
        "fp32": {"network_input": "*fp32"},
        "bf16": {"network_input": "*bf16"},
        "fp16": {"network_input": "*fp16"},
        "bf16-state": {"network_input": "*bf16", "state": "*fp32"},
        "bf16-drawn": {"network_input": "*bf16", "drawn": "*fp32"},
        "generator-fp32": {"network_input": "*fp32", "x": "*fp32", "y": "*fp32"},
        "generator-bf16": {"clean": "*bf16", "network_input": "*bf16", "x": "*fp32", "y": "*fp32"},
    }
    for shape, elements in SAMPLES.items():
        for variant, types in variants.items():
            if shape == "3x64x64" or variant in ("bf16", "generator-bf16"):
                name = f"noise_forward/{variant}/{shape}"
                yield case_of_samples(name, noise_forward._noise_forward_kernel, elements, {**common, **types})


def philox_cases() -> Iterator[StaticCase]:
    """A point, an image of 8x8 and one of 64x64: every branch of the tile's shape."""
    for count in SAMPLES.values():
        types = {"out": "*fp32", "positions": "*i64", "seed": "*i64"}
        constants = dict(zip(("ROWS", "BLOCKS"), philox._normal_tile(count), strict=True))
        even = count % 16 == 0
        name, kernel = f"philox_normal/{count}", philox._normal_kernel
        yield case(name, kernel, types, constants, ("count",) * even, vector_pointers=even)


def rdmd_gradient_cases() -> Iterator[StaticCase]:
    """Each sample size, dtype, cost and optional input; ``dmd`` at 16 to 3,072 partial sums of a sample."""
    residual_types = {"residuals": "*fp32", "table": "*fp32", "reading_x": None, **NOISE, **READING}
    variants = {
        "fp32": {"f_real": "*fp32", "clean": "*fp32"},
        "bf16": {"f_real": "*bf16", "clean": "*fp32"},
        "generator-bf16": {"f_real": "*bf16", "clean": "*bf16", "reading_x": "*fp32"},
    }
    for shape, elements in SAMPLES.items():
        for variant, types in variants.items():
            name, kernel = f"rdmd_residual/{variant}/{shape}", rdmd_gradient._residual_kernel
            # A sum is all that it stores: no 16-byte stores to demand.
            yield case_of_samples(name, kernel, elements, {**residual_types, **types}, vectors=False)

    common = dict.fromkeys(("score_partials", "cost_partials", "x", "table"), "*fp32")
    common |= {"extra": None, "weights": None, "residuals": None, **READING}
    common |= dict.fromkeys(("transport_weight", "factor", "delta", "floor"), "fp32")

    def networks(kind: str) -> dict[str, str | None]:
        return dict.fromkeys(("f_real", "f_fake", "output", "gradient"), kind)

    def gradient_case(name: str, elements: int, types: dict, cost: str = "squared_l2") -> StaticCase:
        partials = rdmd_gradient._partials_width(chunk_count(elements)) if types.get("residuals") else 1
        kernel, constants = rdmd_gradient._gradient_kernel, {"COST": cost, "PARTIALS": partials}
        return case_of_samples(f"rdmd_gradient/{name}", kernel, elements, {**common, **types}, **constants)

    bf16 = networks("*bf16")
    dmd = {**bf16, "residuals": "*fp32"}
    for shape, elements in {**SAMPLES, "3x512x512": 786432, "3x1024x1024": 3145728}.items():
        yield gradient_case(f"dmd/{shape}", elements, dmd)
    for shape, elements in SAMPLES.items():
        yield gradient_case(f"uniform/{shape}", elements, bf16)
    yield gradient_case("uniform/fp32", 12288, networks("*fp32"))
    yield gradient_case("uniform/fp16", 12288, networks("*fp16"))
    yield gradient_case("dmd/extra", 12288, {**dmd, "extra": "*fp32"})
    for shape, elements in SAMPLES.items():
        yield gradient_case(f"dmd/weights/{shape}", elements, {**dmd, "weights": "*fp32"})
    yield gradient_case("uniform/weights", 12288, {**bf16, "weights": "*fp32"})
    for cost in rdmd_gradient.COSTS[1:]:
        types = {**bf16, "extra": "*fp32"} if cost == "none" else bf16
        yield gradient_case(f"uniform/{cost}", 12288, types, cost)


def scaled_residual_cases() -> Iterator[StaticCase]:
    """Forward, backward, the backward of a slice, and both with biases, in each dtype."""
    tile = {"TILE_R": residual.BLOCK // 128, "TILE_C": 128}
    for dtype in DTYPES:
        # The gradient of a slice; with sums for biases; the sums alone, at scale 1.
        for name, has_dx, has_sum in (("slice", True, False), ("slice/sums", True, True), ("sums", False, True)):
            partials = "*fp32" if has_sum else None
            types = {"dy": f"*{dtype}", "dx": f"*{dtype}" if has_dx else None, "partials": partials, "scale": "fp32"}
            constants = {"HAS_DX": has_dx, "HAS_SUM": has_sum, "STEPS": 4 if has_sum else 1, **tile}
            kernel = residual._scaled_rows_kernel
            yield case(f"scaled_residual/{name}/{dtype}", kernel, types, constants, ("rows", "columns", "stride"))
        types = dict.fromkeys(("h", "x", "bias", "second", "y"), f"*{dtype}") | {"scale": "fp32"}
        constants = {"HAS_SECOND": True, **tile}
        kernel = residual._biased_rows_kernel
        yield case(f"scaled_residual/biases/{dtype}", kernel, types, constants, ("rows", "columns"))
        types = {"partials": "*fp32", "sums": f"*{dtype}"}
        constants = {"TILE_P": _merge.TILE_PROGRAMS, "TILE_C": _merge.TILE_COLUMNS}
        launched = {"multiples": ("programs", "columns"), "vector_pointers": False}
        yield case(f"merge/{dtype}", _merge.merge_kernel, types, constants, **launched)
    for dtype in DTYPES:
        for name, has_x in (("forward", True), ("backward", False)):
            types = {"h": f"*{dtype}", "x": f"*{dtype}" if has_x else None, "y": f"*{dtype}", "scale": "fp32"}
            constants = {"HAS_X": has_x, "BLOCK": residual.BLOCK}
            yield case(f"scaled_residual/{name}/{dtype}", residual._scaled_sum_kernel, types, constants, ("count",))


def static_cases() -> list[StaticCase]:
    """All of them."""
    listings = (
        denoising_loss_cases, ema_update_cases, group_norm_silu_cases, image_normalize_cases, noise_forward_cases,
        philox_cases, rdmd_gradient_cases, scaled_residual_cases,
    )  # fmt: skip
    return [each for listing in listings for each in listing()]
