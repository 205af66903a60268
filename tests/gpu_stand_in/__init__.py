"""A stand-in for a GPU: see README.md."""


def install() -> None:
    """Put a cuda:0, a Triton driver for it and its collectives in place, before anything looks for a GPU."""
    from tests.gpu_stand_in import collectives, device, graphs, inductor, triton_driver

    device.install()
    graphs.install()
    triton_driver.install()
    inductor.install()
    collectives.install()
