def pytest_addoption(parser):
    parser.addoption(
        "--compile", action="store_true", help="time torch.compile on the CPU too (it always is timed on a GPU)"
    )
