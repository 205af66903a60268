"""Which setting is better, on numbers whose answer is plain."""

import math

import pytest

from rdmd_fast.figures.comparison import Measured, Setting, compare, dominates, settings_of
from rdmd_fast.figures.conditional import differences, in_words, training_cost
from rdmd_fast.figures.tradeoff import curves, short_names, varied


def setting(name, frechet, l2, error=0.1, method="sdedit"):
    values = {"frechet": Measured(frechet, error), "l2": Measured(l2, error)}
    return Setting(method, name, 3, values)


def rows(method, name, values, **more):
    return [{"method": method, "setting": name, "seed": seed, **value, **more} for seed, value in enumerate(values)]


def test_mean_and_error_over_the_seeds():
    found = settings_of(
        rows("RDMD", "λ 1", [{"l2": 1.0, "psnr": None}, {"l2": 2.0, "psnr": 3.0}, {"l2": 6.0, "psnr": 3.0}])
    )
    assert len(found) == 1 and found[0].seeds == 3
    assert found[0].values["l2"] == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert "psnr" not in found[0].values


def test_domination_is_by_two_standard_errors_of_the_difference():
    near = 2 * math.hypot(0.1, 0.1)
    here = setting("", 5.0, 3.0)
    assert dominates(here, setting("", 5.0 + 1.01 * near, 3.0), "frechet")
    assert not dominates(here, setting("", 5.0 + 0.99 * near, 3.0), "frechet")
    assert dominates(here, setting("", 9.0, 3.0 - 0.99 * near), "frechet")  # hardly less faithful
    assert not dominates(here, setting("", 9.0, 3.0 - 1.01 * near), "frechet")
    assert dominates(here, setting("", 5.0, 4.0), "frechet")
    assert not dominates(here, here, "frechet")


def test_a_baseline_in_words():
    ours = [setting("λ 0.1", 4.0, 5.0, method="RDMD"), setting("λ 1", 10.0, 3.0, method="RDMD")]
    text = compare([setting("a", 2.5, 5.0), setting("b", 12.0, 5.0), setting("c", 20.0, 1.0)], ours, "frechet")
    assert text.startswith("sdedit, 3 settings against 2 of RDMD.")
    assert (
        "1 of 3 is better (a), most at a: Fréchet distance 2.50 ± 0.10 at L2 5.00 ± 0.10 against Fréchet distance "
        "4.00 ± 0.10 at L2 5.00 ± 0.10 of RDMD λ 0.1, Fréchet distance lower by 1.50." in text
    )
    assert "1 of 3 is worse (b), most at b:" in text and "of RDMD λ 0.1, Fréchet distance higher by 8.00." in text
    assert "Neither better nor worse than any of RDMD's: c (Fréchet distance 20.00" in text


def test_a_setting_between_two_of_ours_is_both():
    ours = [setting("λ 0.1", 4.0, 5.0, method="RDMD"), setting("λ 1", 10.0, 6.0, method="RDMD")]
    text = compare([setting("a", 6.0, 5.5)], ours, "frechet")
    assert "1 of them is better than one λ and worse than another" in text
    assert "No setting is better" in compare([setting("a", 6.0, 7.0)], ours[:1], "frechet")


def test_one_generator_beside_those_of_single_weights():
    ours = rows(
        "RDMD", "λ 1", [{"l2": v, "share_3nn": 1.0} for v in (1.0, 2.0, 3.0)], training_seconds=10.0, training_steps=5
    )
    ours += rows(
        "RDMD", "λ 2", [{"l2": v, "share_3nn": 1.0} for v in (1.0, 1.0, 1.0)], training_seconds=30.0, training_steps=5
    )
    one = rows(
        "one", "λ 1", [{"l2": v, "share_3nn": 1.0} for v in (2.0, 3.0, 4.0)], training_seconds=12.0, training_steps=6
    )
    one += rows(
        "one", "λ 2", [{"l2": v, "share_3nn": 0.5} for v in (1.0, 1.0, 1.0)], training_seconds=12.0, training_steps=6
    )
    table = {(line["setting"], line["metric"]): line for line in differences(settings_of([*ours, *one]))}
    assert table["λ 1", "l2"]["difference_in_errors"] == pytest.approx(1 / math.sqrt(2 / 3))
    assert table["λ 1", "l2"]["within"] and table["λ 1", "share_3nn"]["difference_in_errors"] == 0
    assert table["λ 2", "l2"]["within"]
    assert table["λ 2", "share_3nn"]["within"] is False  # no error covers it
    cost = training_cost([*ours, *one])
    assert cost["separate_seconds"] == 40.0 and cost["ratio"] == 0.3 and cost["runs"] == 2
    assert (cost["one_steps"], cost["separate_steps"], cost["one_seconds"]) == (6, 10, 12.0)
    text = in_words(list(table.values()), cost, 3)
    assert "3 of 4 numbers lie within two standard errors" in text and "share_3nn at λ 2 (-0.500)" in text


def test_settings_of_other_options_are_another_curve():
    group = [setting(name, 1.0, l2) for name, l2 in (("N 2", 3.0), ("N 4", 1.0), ("N 2, stop 1.0", 2.0))]
    assert [[each.name for each in curve] for curve in curves(group)] == [["N 4", "N 2"], ["N 2, stop 1.0"]]


def test_points_are_named_by_what_differs():
    names = ("steps 40, factor 2, stop 0.1", "steps 40, factor 2, stop 1.0", "steps 40, factor 4")
    group = [setting(name, 1.0, 1.0) for name in names]
    assert varied(group) == ["factor", "stop"]
    assert list(short_names(group).values()) == ["2/0.1", "2/1", "4/–"]
    assert short_names([setting("σ 1", 1.0, 1.0)]) == {"σ 1": "σ 1"}
    ours = [setting(name, 1.0, 1.0, method="RDMD") for name in ("λ 0.1", "λ 1")]
    assert list(short_names(ours).values()) == ["λ 0.1", "λ 1"]
