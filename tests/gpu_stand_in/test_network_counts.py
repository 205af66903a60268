"""Launches and bytes of the networks: none is added unseen, and ours stay below the plain form's by what docs say."""

import json

import pytest

from tests.gpu_stand_in.child import run
from tests.gpu_stand_in.network_counts import COUNTED, KEY, NETWORKS, read_table

COUNT = ["-m", "tests.gpu_stand_in.network_counts", "--network"]


def check(tmp_path, *arguments):
    run(*COUNT, *arguments, "--json", tmp_path / "rows.json")
    table, rows = read_table(), json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        found = {name: row[name] for name in COUNTED}
        said = f"if that is meant, python {' '.join(COUNT + list(arguments))} --table"
        assert found == table[tuple(row[name] for name in KEY)] and not row["waits"], said
    return rows


@pytest.mark.gpu_stand_in
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_written_network_asks_what_the_table_says(network, tmp_path):
    assert len(check(tmp_path, network)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_network_asks_what_the_table_says(tmp_path):
    assert len(check(tmp_path, "songunet64", "--compile")) == 4


def test_ours_asks_less_than_the_plain_form():
    """At batch 2 in bf16; at batch 8, which shares copies of weights, the last ratio is 0.61."""
    table = read_table()
    for run_, launches, bytes_ in (("written", 0.61, 0.61), ("compiled", 0.79, 0.636)):
        ours, plain = (table["songunet64", "bf16", form, run_] for form in ("ours", "plain"))
        assert ours["launches"] <= launches * plain["launches"] and ours["bytes"] <= bytes_ * plain["bytes"]
