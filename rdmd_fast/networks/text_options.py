"""The network of a text-to-image pipeline of diffusers, the schedule that it was trained on, and how it is prompted."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from rdmd_fast.networks.diffusers_options import FlowSchedule, Size, VPSchedule
from rdmd_fast.options import Options

# Keys of a UNet2DConditionModel's config whose other values ask for inputs that nobody gives it here.
REQUIRED = {
    "class_embed_type": (None,), "num_class_embeds": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "time_cond_proj_dim": (None,), "time_embedding_type": (None, "positional"),
}  # fmt: skip
ADDED = {"stable_diffusion": None, "stable_diffusion_xl": "text_time"}
TIME_IDS = 6  # original height and width, crop from the top and the left, target height and width, pixels


class Transformer(NamedTuple):
    """A transformer of diffusers.

    Attributes:
        class_name: the library's.
        sizes: in its config.json, with the library's defaults.
        packing: squares of so many latents a side are one input.
    """

    class_name: str
    sizes: dict[str, int]
    packing: int = 1


TRANSFORMERS = {
    "stable_diffusion_3": Transformer(
        "SD3Transformer2DModel",
        {
            "in_channels": 16, "patch_size": 2, "num_layers": 18, "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 96,
        },
    ),
    "flux": Transformer(
        "FluxTransformer2DModel",
        {
            "in_channels": 64, "patch_size": 1, "num_layers": 19, "num_single_layers": 38,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        },
        packing=2,
    ),
}  # fmt: skip


class LoRAOptions(Options):
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) B A, of which only A and B are trained."""

    rank: int = Field(4, ge=1, le=4096, description="rows of A (OSEDiff: 4, TSD-SR: 64)")
    alpha: float | None = Field(None, gt=0, le=1e6, description="scale of B A times the rank; unset: the rank")
    targets: Literal["attention", "attention_feed_forward", "all"] = Field(
        "attention",
        description="layers that get one: the attention's projections; those and the feed-forward layers beside them; "
        "all linear layers and convolutions (OSEDiff)",
    )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class TextOptions(Options):
    """What networks of all families have in common; one is told one prompt for all samples.

    Attributes:
        part: of the pipeline, which its folder and the keys of the state dict are named by.
        config: the part's config.json, without the keys that begin with an underscore.
        channels: of a latent.
        width: of a token's embedding.
        pooled_width: of a prompt's pooled embedding; 0 for a family without.
        tells_size: whether it is told the size of pictures.
        embeds_guidance: whether it is told how far to be guided, as one number.
        usual_guidance: of a teacher.
        layers: of its blocks, at least.
        divisor: of a latent's sides.
        longest: side of a latent that it takes; None for any.
    """

    part: ClassVar[str]
    schedule: Annotated[VPSchedule | FlowSchedule, Field(discriminator="kind")]
    tokens: Size = Field(77, description="length of an embedded prompt")
    guidance: float = Field(
        1.0, ge=0, le=100, description="s of F = F_negative + s (F_prompt - F_negative); 1 is the prompt alone"
    )
    lora: LoRAOptions | None = Field(
        None,
        exclude_if=lambda lora: lora is None,  # what was written before it was known stays as it is
        description="adapters, which alone are trained; unset: none, all weights are",
    )
    tells_size: ClassVar[bool] = False
    embeds_guidance: ClassVar[bool] = False
    usual_guidance: ClassVar[float] = 1.5  # near DMD2's 1.75
    longest: ClassVar[int | None] = None

    @classmethod
    def class_of(cls, family: str) -> str:
        """diffusers' class of a family's network."""
        raise NotImplementedError

    def without_dropout(self) -> Self:
        return self


class TextUNetOptions(TextOptions):
    """A diffusers UNet2DConditionModel read as one of our networks."""

    part: ClassVar[str] = "unet"
    kind: Literal["text_unet"] = "text_unet"
    family: Literal["stable_diffusion", "stable_diffusion_xl"] = Field(description="pipeline that it is of")
    unet: dict[str, Any] = Field(description="its config.json, without the keys that begin with an underscore")

    @model_validator(mode="after")
    def _consistent(self):
        for key, values in REQUIRED.items():
            if self.unet.get(key) not in values:
                raise ValueError(f"unet.{key}: {self.unet[key]!r} is not supported, only {values[-1]!r} is")
        added = self.unet.get("addition_embed_type")
        if added != ADDED[self.family]:
            raise ValueError(f"unet.addition_embed_type: {added!r}, a {self.family} has {ADDED[self.family]!r}")
        channels, made = self.unet.get("in_channels", 4), self.unet.get("out_channels", 4)
        if channels != made or not isinstance(channels, int):
            raise ValueError(f"unet.out_channels is {made!r}, in_channels {channels!r}: inpainting is not supported")
        if not _is_size(self.unet.get("cross_attention_dim", 1280)):
            raise ValueError(f"unet.cross_attention_dim: {self.unet['cross_attention_dim']!r} is not one width")
        if added and self.pooled_width < 1:
            raise ValueError("unet.projection_class_embeddings_input_dim: leaves no room for a pooled embedding")
        levels = self.unet.get("block_out_channels", [320])
        if not isinstance(levels, list) or not levels or not all(map(_is_size, levels)):
            raise ValueError(f"unet.block_out_channels: {levels!r} is no list of widths")
        return self

    @property
    def config(self) -> dict[str, Any]:
        return self.unet

    @property
    def channels(self) -> int:
        return self.unet.get("in_channels", 4)

    @property
    def width(self) -> int:
        return self.unet.get("cross_attention_dim", 1280)

    @property
    def tells_size(self) -> bool:
        return ADDED[self.family] is not None

    @property
    def pooled_width(self) -> int:
        if ADDED[self.family] is None:
            return 0
        keys = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        whole, each = (self.unet[key] if _is_size(self.unet.get(key)) else 0 for key in keys)
        return whole - TIME_IDS * each

    @property
    def layers(self) -> int:
        levels, each = self.unet.get("block_out_channels", (320, 640, 1280, 1280)), self.unet.get("layers_per_block", 2)
        counts = each if isinstance(each, list) else [each] * len(levels)
        return sum(count for count in counts if isinstance(count, int))

    @property
    def divisor(self) -> int:
        return 2 ** (len(self.unet.get("block_out_channels", (320, 640, 1280, 1280))) - 1)

    @classmethod
    def class_of(cls, family: str) -> str:
        return "UNet2DConditionModel"

    def without_dropout(self) -> Self:
        return self.model_copy(update={"unet": {**self.unet, "dropout": 0.0}})


class TextTransformerOptions(TextOptions):
    """A transformer on latents of the straight path x_t = (1 - t) x + t ε, read as one of our networks."""

    part: ClassVar[str] = "transformer"
    kind: Literal["text_transformer"] = "text_transformer"
    family: Literal["stable_diffusion_3", "flux"] = Field(description="pipeline that it is of")
    transformer: dict[str, Any] = Field(description="its config.json, without the keys that begin with an underscore")

    @model_validator(mode="after")
    def _consistent(self):
        for key in TRANSFORMERS[self.family].sizes:
            if not _is_size(self._value(key)):
                raise ValueError(f"transformer.{key}: {self._value(key)!r} is not a size")
        channels, made = self._value("in_channels"), self.transformer.get("out_channels")
        if made not in (None, channels):
            raise ValueError(f"transformer.out_channels is {made!r}, in_channels {channels!r}: they must be alike")
        if self._packing > 1 and (channels % self._packing**2 or self._value("patch_size") != 1):
            raise ValueError(
                f"transformer.in_channels: {channels} in patches of {self._value('patch_size')} are not those of "
                f"{self._packing}×{self._packing} latents"
            )
        if not isinstance(self.schedule, FlowSchedule):
            raise ValueError("schedule: a transformer of this family is trained on the straight path alone")
        return self

    @classmethod
    def class_of(cls, family: str) -> str:
        return TRANSFORMERS[family].class_name

    @property
    def config(self) -> dict[str, Any]:
        return self.transformer

    @property
    def channels(self) -> int:
        return self._value("in_channels") // self._packing**2

    @property
    def width(self) -> int:
        return self._value("joint_attention_dim")

    @property
    def pooled_width(self) -> int:
        return self._value("pooled_projection_dim")

    @property
    def embeds_guidance(self) -> bool:
        return bool(self.transformer.get("guidance_embeds"))

    @property
    def usual_guidance(self) -> float:
        return 1.0 if self.family == "flux" else TextOptions.usual_guidance

    @property
    def layers(self) -> int:
        sizes = TRANSFORMERS[self.family].sizes
        return sum(self._value(key) for key in ("num_layers", "num_single_layers") if key in sizes)

    @property
    def divisor(self) -> int:
        return self._value("patch_size") * self._packing

    @property
    def longest(self) -> int | None:
        if "pos_embed_max_size" not in TRANSFORMERS[self.family].sizes:
            return None
        return self._value("pos_embed_max_size") * self._value("patch_size")

    @property
    def _packing(self) -> int:
        return TRANSFORMERS[self.family].packing

    def _value(self, key: str) -> Any:
        return self.transformer.get(key, TRANSFORMERS[self.family].sizes[key])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**14
