"""Results of an iteration's benchmark: records of the sides and their ratios, the printed table, the picture."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20
OUR_SIDES, PLAIN_SIDES = ("ours", "ours_compiled"), ("plain", "plain_compiled", "plain_fp32")
OTHER_SIDES = (*PLAIN_SIDES, "fastgen")


def record(facts: dict, sides: dict[str, dict], flops: float, matmul_rates: dict[str, float], bandwidth: float) -> dict:
    """Put an entry of the results together: ``facts``, what was measured of ``sides``, the floor, ratios of the sides.

    ``flops`` are an iteration's, the matmul rates FLOP/s by dtype, the bandwidth bytes/s.
    """
    entry, batch, peak = dict(facts), facts["batch"], matmul_rates[facts["dtype"]]
    for name, side in sides.items():
        rate = matmul_rates["fp32"] if name == "plain_fp32" else peak
        speed, mfu = batch / side["seconds"], flops / side["seconds"] / rate
        entry[name] = {"images_per_second": speed, "seconds": side["seconds"], "mfu": mfu, **side}
    # Matrix products at the speed of a large one, all other bytes at that of a large copy, neither hidden by the other.
    entry |= {"flops": flops, "matmul_peak": peak, "copy_bandwidth": bandwidth}
    if "bytes_outside_matmuls" in entry.get("ours", {}):
        entry["floor_seconds"] = flops / peak + entry["ours"]["bytes_outside_matmuls"] / bandwidth
    if entry["dtype"] == "fp32" and "plain" in entry:
        entry["plain_fp32"] = entry["plain"]
    if "ours" in entry and "plain" in entry:
        entry["ratio"] = entry["plain"]["seconds"] / entry["ours"]["seconds"]
    entry["ratios"] = {
        our: {other: entry[other]["seconds"] / entry[our]["seconds"] for other in OTHER_SIDES if other in entry}
        for our in OUR_SIDES if our in entry
    }  # fmt: skip
    if "ours" in entry and "fastgen" in entry:
        entry["fastgen_ratios"] = fastgen_ratios(entry["ours"], entry["fastgen"])
    return entry


def fastgen_ratios(ours: dict, fastgen: dict) -> dict[str, float]:
    """Divide what FastGen's iteration takes by what ours takes."""
    both = ("seconds", "cpu_seconds", "operations", "launches", "bytes_outside_matmuls", "peak_bytes")
    return {name: fastgen[name] / ours[name] for name in both if name in ours and name in fastgen}


def print_table(entries: list[dict]) -> None:
    """Print an entry a dtype: a line for each side, ratios, and the floor."""
    for entry in entries:
        print(f"{entry['case']}, {entry['dtype']}, batch {entry['batch']}, ZeRO {entry['stage']}, on {entry['device']}")
        for side in (*OUR_SIDES, *OTHER_SIDES):
            if side in entry:
                row = entry[side]
                moved = f"{row['bytes_outside_matmuls'] / MIB:.0f}" if "bytes_outside_matmuls" in row else "-"
                print(
                    f"  {side:<15} {row['seconds'] * 1e3:10.2f} ms  {row['images_per_second']:10.1f} images/s  "
                    f"MFU {row['mfu']:5.1%}  peak {row['peak_bytes'] / MIB:6.0f} MiB  outside matmuls {moved:>6} MiB  "
                    f"host syncs {row.get('host_syncs', '-'):>4}  launches {row.get('launches', '-'):>5}"
                )
        for our, ratios in entry["ratios"].items():
            print(f"  {our} {', '.join(f'{ratio:.2f} times {plain}' for plain, ratio in ratios.items()) or 'alone'}")
        for side in (*OUR_SIDES, *OTHER_SIDES):
            if "passes" in entry.get(side, {}):
                passes = ", ".join(f"{kind} {count}" for kind, count in entry[side]["passes"]["all"].items())
                print(f"  {side}: passes {passes}; operations {entry[side]['operations']}")
        if "fastgen_ratios" in entry:
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in entry["fastgen_ratios"].items())
            print(f"  FastGen over ours: {ratios}")
        print(
            f"  {entry['flops'] / 1e9:.2f} GFLOP; matrix products reach {entry['matmul_peak'] / 1e9:.0f} GFLOP/s, "
            f"copies {entry['copy_bandwidth'] / 1e9:.1f} GB/s",
            end="",
        )
        floor = entry.get("floor_seconds")
        print(f": floor {floor * 1e3:.2f} ms, {floor / entry['ours']['seconds']:.0%} of ours" if floor else "")
        for who, count in entry.get("ours", {}).get("host_syncs_of", {}).items():
            print(f"  host syncs of {who}: {count}")


def draw(entries: list[dict], path: Path) -> None:
    """Draw a bar for each entry: where an iteration's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.6 * len(entries)), layout="constrained")
    names = list(dict.fromkeys(name for entry in entries for name in entry["phases"]))
    lefts = [0.0] * len(entries)
    labels = [f"{entry['case']} {entry['dtype']}" for entry in entries]
    for name in names:
        widths = [entry["phases"].get(name, 0.0) / sum(entry["phases"].values()) for entry in entries]
        axis.barh(labels, widths, left=lefts, label=name, color="lightgrey" if name == "other" else None)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.set(xlim=(0, 1), xlabel="share of an iteration")
    axis.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)
