def pytest_addoption(parser):
    parser.addoption(
        "--compile", action="store_true", help="time torch.compile on the CPU too (it always is timed on a GPU)"
    )
    parser.addoption("--rows", metavar="FILE", help="keep the measurements of test_kernels.py there, as they come")
    parser.addoption("--largest", type=int, metavar="N", help="of each kernel's shapes only the N with most bytes")
    parser.addoption("--images", type=int, default=4096, help="images of each set in test_data.py (default: 4096)")


def pytest_configure(config):
    config.data_rows, config.kernel_rows = [], []


def pytest_terminal_summary(terminalreporter, config):
    """The rows of test_data.py as one table, each beside plain WebDataset in the same run."""
    if not config.data_rows:
        return
    terminalreporter.section("samples a second")
    header = f"{'format':6} {'workers':>7} {'pipeline':20} {'samples/s':>10} {'x WebDataset':>12} {'added MiB':>10}"
    terminalreporter.write_line(header)
    plain = {(r["format"], r["workers"]): r for r in config.data_rows if r["pipeline"] == "WebDataset"}
    for row in sorted(config.data_rows, key=lambda row: (row["format"], row["workers"])):
        reference = plain.get((row["format"], row["workers"]))
        ratio = f"{row['samples_per_second'] / reference['samples_per_second']:.2f}" if reference else "-"
        speed, added = f"{row['samples_per_second']:,.0f}", f"{row['added_MiB']:.0f}"
        terminalreporter.write_line(
            f"{row['format']:6} {row['workers']:>7} {row['pipeline']:20} {speed:>10} {ratio:>12} {added:>10}"
        )
