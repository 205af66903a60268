"""Feature networks that others have trained: TorchScript files that the user names, and LPIPS.

A TorchScript file is a program, and loading it runs it: name only files whose origin you trust.

What a file takes, by its ``input``:
    uint8   pixels of 0 to 255, as the Inception network of 2015 does that FID papers use
            (inception-2015-12-05.pt of NVIDIA's StyleGAN; forward(images, return_features=True) resizes them itself)
    float   images in [-1, 1]
    auto    uint8 if the file's forward has an argument ``return_features``, as that Inception's has; else float
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.files import check_readable, is_file, sha256_of

PixelInput = Literal["auto", "uint8", "float"]
LPIPS = "lpips"


class FeatureNetwork(torch.nn.Module):
    """A TorchScript file as a frozen network of images [N, C, H, W] (or of points [N, D]) in [-1, 1].

    Args:
        path: of the file; it is loaded onto ``device`` and put into evaluation mode.
        pixels: how it takes images (see the module).

    Attributes:
        pixels: "uint8" or "float".
        sha256: of the file.

    Raises:
        InputError: there is no such file, or it is no TorchScript.
    """

    def __init__(self, path: str | Path, pixels: PixelInput = "auto", device: torch.device | str = "cpu"):
        super().__init__()
        self.path = Path(path)
        if not is_file(path):
            raise InputError(f"{path}: no such file, name a TorchScript file of a feature network")
        check_readable(path)
        self.sha256 = sha256_of(self.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have torch.export
                self.script = torch.jit.load(str(self.path), map_location=device)
            arguments = {argument.name for argument in self.script.forward.schema.arguments}
        except (RuntimeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: not a TorchScript network ({_reason(error)}), save one by torch.jit.save"
            ) from None
        self.script.eval()
        for parameter in self.script.parameters():  # requires_grad_ of the whole is not for ScriptModules
            parameter.requires_grad_(False)
        self._options = {"return_features": True} if "return_features" in arguments else {}
        self.pixels = pixels if pixels != "auto" else "uint8" if self._options else "float"
        tensors = [*self.script.parameters(), *self.script.buffers()]
        self._dtype = next((each.dtype for each in tensors if each.is_floating_point()), torch.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, differentiable in ``images``: a file for pixels gets them unrounded, as floats of 0 to 255."""
        return self._run((images + 1) * 127.5 if self.pixels == "uint8" else images)

    @torch.no_grad()
    def measure(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images as they would be saved: a file for pixels gets uint8."""
        from rdmd_fast.pixels import to_uint8

        return self._run(to_uint8(images) if self.pixels == "uint8" else images)

    def _run(self, network_input: torch.Tensor) -> torch.Tensor:
        if network_input.is_floating_point():
            network_input = network_input.to(self._dtype)
        # Its optimiser would fuse operations after the first calls, which then round otherwise: a resumed run would
        # not repeat the unbroken one.
        with torch.jit.optimized_execution(False):
            features = self.script(network_input.contiguous(), **self._options)
        if not isinstance(features, torch.Tensor):
            raise InputError(f"{self.path}: gives a {type(features).__name__}, save a network that gives one tensor")
        return features


class PerceptualDistance(torch.nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) by the package lpips, version 0.1 of its weights on AlexNet.

    Raises:
        InputError: lpips, or the torchvision that it needs, cannot be imported or has no weights at hand.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        try:
            import lpips

            with warnings.catch_warnings(), contextlib.redirect_stdout(None):
                warnings.simplefilter("ignore")
                self.network = lpips.LPIPS(net="alex", verbose=False)
        except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch raises RuntimeError
            raise InputError(
                f"lpips: cannot be used ({_reason(error)}), run `pip install rdmd_fast[lpips]` with a torchvision that "
                "fits this torch"
            ) from None
        self.network.to(device).eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The distance of each pair of images [N, 3, H, W] in [-1, 1]; [N]."""
        return self.network(x, y).flatten()


@contextlib.contextmanager
def fitting(what: str | Path, device: torch.device | str, smaller: str) -> Iterator[None]:
    """Memory of ``device`` that a network lacks becomes one line that names it and what to lower."""
    try:
        yield
    except RuntimeError as error:
        # TorchScript raises what happened inside of it as a plain RuntimeError, with the first one's name and text.
        if not (isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error))):
            raise
        raise InputError(f"{what}: does not fit the memory of {device}, lower {smaller}") from None


_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory")


@contextlib.contextmanager
def naming(what: str | Path, shape: tuple[int, ...], device: torch.device | str, smaller: str) -> Iterator[None]:
    """What a feature network raises of samples of ``shape`` becomes one line that names it; and as ``fitting``."""
    try:
        with fitting(what, device, smaller):
            yield
    except (RuntimeError, torch.jit.Error, ValueError, TypeError) as error:
        raise InputError(
            f"{what}: does not take samples of shape {list(shape)} ({_reason(error)}), name another feature network"
        ) from None


def _reason(error: Exception) -> str:
    """The last line of a message: TorchScript's traceback comes before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]
