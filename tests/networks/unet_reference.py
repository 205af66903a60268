"""The image networks as the papers describe them, read off a state dict: explicit filters, moments and softmax.

For SongUNet (Song et al., arXiv 2011.13456) and DhariwalUNet (arXiv 2105.05233) in EDM's configurations (arXiv
2206.00364). Nothing here comes from rdmd_fast but the weights.
"""

import math

import torch
import torch.nn.functional as F


def randomised(network, dtype=torch.float64):
    """The network with every parameter mattering: none is near zero."""
    generator = torch.Generator().manual_seed(0)
    network = network.to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(0.3 * noise + 1 if parameter.ndim == 1 else noise / math.sqrt(fan_in))
    return network.eval()


def inputs(config: dict, batch: int = 3) -> dict:
    """A call's arguments in fp64, with the labels that the network takes."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = config["img_resolution"]
    call = dict(x=normal(batch, 3, size, size), c_noise=normal(batch))
    if classes := config.get("label_dim"):
        call["class_labels"] = torch.eye(classes, dtype=torch.float64)[torch.arange(batch) % classes]
    if config.get("augment_dim"):
        call["augment_labels"] = normal(batch, config["augment_dim"])
    return call


def assert_gradients_match_finite_differences(network, call):
    """Along a random direction, of the input and of each parameter."""
    weights = torch.randn_like(call["x"])
    tensors = [call["x"].requires_grad_(), *network.parameters()]
    gradients = torch.autograd.grad((network(**call) * weights).sum(), tensors)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        direction, step = torch.randn_like(tensor), 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                tensor += sign * step * direction
                values.append((network(**call) * weights).sum())
            tensor += step * direction
        numeric = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-5)


def silu(x):
    return x / (1 + torch.exp(-x))


class PlainUNet:
    """What both networks consist of."""

    taps = torch.ones(2, dtype=torch.float64)
    eps: float
    skip_scale: float

    def __init__(self, network):
        self.state = network.state_dict()

    def names(self, part):
        """Layers of "enc" or "dec", in order."""
        layers = (key.split(".")[:2] for key in self.state)
        return list(dict.fromkeys(f"{part}.{layer}" for first, layer in layers if first == part))

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def conv(self, name, x, padding=None):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, padding=padding) + bias[:, None, None]

    def smooth(self, x, padding):
        kernel = self.taps.outer(self.taps) / self.taps.sum() ** 2
        return F.conv2d(x, kernel.repeat(x.shape[1], 1, 1, 1), padding=padding, groups=x.shape[1])

    def down(self, x):
        return self.smooth(x, (len(self.taps) - 1) // 2)[:, :, ::2, ::2]

    def up(self, x):
        """Insert zeros between the pixels, then smooth, keeping the mean."""
        zeros = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        zeros[:, :, ::2, ::2] = x
        return 4 * self.smooth(F.pad(zeros, (1, 0, 1, 0)), (len(self.taps) - 2) // 2)

    def norm(self, name, x):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        grouped = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
        normed = ((grouped - mean) / (var + self.eps).sqrt()).reshape(x.shape)
        return normed * weight[:, None, None] + bias[:, None, None]

    def attend(self, name, x):
        """Inside a head, channel 3 c + i of qkv is channel c of query, key or value."""
        batch, channels = x.shape[:2]
        heads = self.heads(channels)
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x))
        q, k, v = qkv.reshape(batch, heads, channels // heads, 3, -1).unbind(3)
        logits = torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(channels // heads)
        weights = logits.exp() / logits.exp().sum(3, keepdim=True)
        attended = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
        return (x + self.conv(f"{name}.proj", attended)) * self.skip_scale

    def block(self, name, x, embedding):
        resample = self.up if name.endswith("_up") else self.down if name.endswith("_down") else lambda y: y
        h = self.conv(f"{name}.conv0", resample(silu(self.norm(f"{name}.norm0", x))))
        modulation = self.linear(f"{name}.affine", embedding)[:, :, None, None]
        h = self.conv(f"{name}.conv1", silu(self.modulated_norm(f"{name}.norm1", h, modulation)))
        x = resample(x)
        if f"{name}.skip.weight" in self.state:
            x = self.conv(f"{name}.skip", x)
        h = (h + x) * self.skip_scale
        return self.attend(name, h) if f"{name}.qkv.weight" in self.state else h

    def waves(self, c_noise, freqs):
        phase = c_noise[:, None] * torch.as_tensor(freqs, dtype=torch.float64)
        return phase.sin(), phase.cos()


class PlainSongUNet(PlainUNet):
    eps, skip_scale = 1e-6, 1 / math.sqrt(2)

    def __init__(self, network, config):
        super().__init__(network)
        self.taps = torch.tensor(config.get("resample_filter", [1, 1]), dtype=torch.float64)
        self.fourier = config.get("embedding_type") == "fourier"

    def heads(self, channels):
        return 1

    def modulated_norm(self, name, h, modulation):
        return self.norm(name, h + modulation)

    def embed(self, c_noise, class_labels, augment_labels):
        half = self.state["map_layer0.weight"].shape[1] // 2
        positional = [10000 ** (-i / (half - 1)) for i in range(half)]
        freqs = 2 * math.pi * self.state["map_noise.freqs"].double() if self.fourier else positional
        embedding = torch.cat(self.waves(c_noise, freqs), dim=1)
        if class_labels is not None:
            embedding = embedding + self.linear("map_label", class_labels * math.sqrt(class_labels.shape[1]))
        if augment_labels is not None:
            embedding = embedding + self.linear("map_augment", augment_labels)
        return silu(self.linear("map_layer1", silu(self.linear("map_layer0", embedding))))

    def __call__(self, x, c_noise, class_labels=None, augment_labels=None):
        embedding = self.embed(c_noise, class_labels, augment_labels)
        skips, aux = [], x
        for name in self.names("enc"):
            if name.endswith("aux_down"):
                aux = self.down(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + self.conv(name, aux)
            elif name.endswith("aux_residual"):  # convolve on a padded image, smooth, keep every other pixel
                padding = 1 + (len(self.taps) - 1) // 2
                x = aux = skips[-1] = (x + self.smooth(self.conv(name, aux, padding), 0)[:, :, ::2, ::2]) / math.sqrt(2)
            else:
                x = self.conv(name, x) if name.endswith("_conv") else self.block(name, x, embedding)
                skips.append(x)
        output = 0
        for name in self.names("dec"):
            if name.endswith("aux_up"):
                output = self.up(output)
            elif name.endswith("aux_conv"):
                output = output + self.conv(name, silu(self.norm(name.replace("conv", "norm"), x)))
            elif not name.endswith("aux_norm"):
                x = torch.cat([x, skips.pop()], dim=1) if "block" in name else x
                x = self.block(name, x, embedding)
        assert not skips
        return output


class PlainDhariwalUNet(PlainUNet):
    eps, skip_scale = 1e-5, 1.0

    def heads(self, channels):
        return channels // 64

    def modulated_norm(self, name, h, modulation):
        scale, shift = modulation.chunk(2, dim=1)
        return self.norm(name, h) * (1 + scale) + shift

    def embed(self, c_noise, class_labels, augment_labels):
        half = self.state["map_layer0.weight"].shape[1] // 2
        sines, cosines = self.waves(c_noise, [10000 ** (-i / half) for i in range(half)])
        embedding = torch.cat([cosines, sines], dim=1)
        if augment_labels is not None:
            embedding = embedding + self.linear("map_augment", augment_labels)
        embedding = self.linear("map_layer1", silu(self.linear("map_layer0", embedding)))
        if class_labels is not None:
            embedding = embedding + self.linear("map_label", class_labels)
        return silu(embedding)

    def __call__(self, x, c_noise, class_labels=None, augment_labels=None):
        embedding = self.embed(c_noise, class_labels, augment_labels)
        skips = []
        for name in self.names("enc"):
            x = self.conv(name, x) if name.endswith("_conv") else self.block(name, x, embedding)
            skips.append(x)
        for name in self.names("dec"):
            x = torch.cat([x, skips.pop()], dim=1) if "block" in name else x
            x = self.block(name, x, embedding)
        assert not skips
        return self.conv("out_conv", silu(self.norm("out_norm", x)))
