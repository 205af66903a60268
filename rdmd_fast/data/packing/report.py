"""What looks wrong in a set of samples: near-empty ones, duplicates, ones unlike the rest, ones of another set.

Nothing is ever left out for it; the lists are for the eye.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

NEAR_EMPTY = 2 / 255  # largest standard deviation over a channel's pixels, as a share of the range
BINS = 8  # of each channel's histogram
UNLIKE = 6.0  # robust standard deviations above the median distance
LEAST_SPREAD = 0.01  # of the distances: in a set of near-equal histograms a pixel must not make an outlier
FEWEST = 20  # samples from which a median says what is usual
NAMED = 3  # examples on the terminal

STATISTIC = (
    f"distance = mean over the channels of half the L1 distance between the image's {BINS}-bin histogram and the "
    f"set's median histogram, in [0, 1]; listed above median + {UNLIKE:g} x 1.4826 x MAD of the distances"
)


class Traits(NamedTuple):
    """What the report needs of one sample.

    Attributes:
        digest: of its pixels or values, hex.
        spread: largest standard deviation of a channel, of range 1 for images; None for points.
        histogram: pixels in each of ``BINS`` bins of red, of green and of blue; None for arrays.
    """

    digest: str
    spread: float | None
    histogram: list[int] | None


def traits_of(sample: np.ndarray) -> Traits:
    """Of uint8 [H, W, 3], or of a float array [C, H, W] or [D]."""
    if sample.dtype != np.uint8:
        spread = float(sample.std(axis=(1, 2), dtype=np.float64).max()) if sample.ndim == 3 else None
        return Traits(digest_of(sample), spread, None)
    pixels = sample.reshape(-1, sample.shape[-1])
    channel = np.arange(sample.shape[-1], dtype=np.uint8) * BINS
    histogram = np.bincount((pixels // (256 // BINS) + channel).ravel(), minlength=BINS * len(channel))
    channels = np.ascontiguousarray(pixels.T)  # sums along the last axis are several times faster
    spread = float(channels.std(axis=1, dtype=np.float64).max()) / 255
    return Traits(digest_of(sample), round(spread, 6), histogram.tolist())


def digest_of(sample: np.ndarray) -> str:
    """Equal for equal samples: 128 bits of BLAKE2 over shape and values (float32 for arrays), hex."""
    values = sample if sample.dtype == np.uint8 else sample.astype(np.float32)
    digest = hashlib.blake2b(repr((values.shape, values.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


def build_report(keys: Sequence[str], traits: Sequence[Traits], unreadable: Iterable[Sequence[str]]) -> dict:
    """report.json of a set: ``traits`` of each sample of ``keys``, and (path, reason) of what could not be read."""
    near_empty = [
        key for key, each in zip(keys, traits, strict=True) if each.spread is not None and each.spread < NEAR_EMPTY
    ]
    listed = set(near_empty)
    unlike = unlike_the_rest(keys, [each.histogram for each in traits])
    return {
        "unreadable": [{"file": path, "reason": reason} for path, reason in unreadable],
        "near_empty": near_empty,
        "duplicates": [group for group in _by_digest(keys, traits).values() if len(group) > 1],
        "unlike_the_rest": [entry for entry in unlike if entry["key"] not in listed],
        "statistic": STATISTIC,
    }


def unlike_the_rest(keys: Sequence[str], histograms: Sequence[list[int] | None]) -> list[dict]:
    """Images whose colours lie far from the set's median (``STATISTIC``), the farthest first."""
    if len(histograms) < FEWEST or histograms[0] is None:
        return []
    shares = np.array(histograms, dtype=np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    distances = np.abs(shares - np.median(shares, axis=0)).sum(axis=1) / 2
    middle = np.median(distances)
    spread = max(1.4826 * np.median(np.abs(distances - middle)), LEAST_SPREAD)
    far = np.flatnonzero(distances > middle + UNLIKE * spread)
    ordered = far[np.argsort(-distances[far], kind="stable")]
    return [{"key": keys[index], "distance": round(float(distances[index]), 4)} for index in ordered]


def shared_samples(keys: Sequence[str], digests: Sequence[str], other: dict[str, list[str]]) -> list[list]:
    """[key, keys of the same sample in the other set] of each sample that both hold."""
    return [[key, other[digest]] for key, digest in zip(keys, digests, strict=True) if digest in other]


def summary(report: dict) -> list[str]:
    """A line for each list that is not empty, with a few examples."""
    lines = []
    for field, words in (("near_empty", "near-empty"), ("unlike_the_rest", "unlike the rest in colour")):
        found = [entry if isinstance(entry, str) else entry["key"] for entry in report[field]]
        if found:
            lines.append(f"{len(found)} {words}: {_examples(found)}")
    if groups := report["duplicates"]:
        again = sum(map(len, groups)) - len(groups)
        lines.append(f"{again} duplicates of others: {_examples([' = '.join(group[:2]) for group in groups])}")
    if shared := report.get("in_other", {}).get("samples"):
        pairs = [f"{key} = {others[0]}" for key, others in shared]
        lines.append(f"{len(shared)} also in {report['in_other']['folder']}: {_examples(pairs)}")
    return lines


def _examples(found: list[str]) -> str:
    return ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")


def _by_digest(keys: Sequence[str], traits: Sequence[Traits]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for key, each in zip(keys, traits, strict=True):
        groups[each.digest].append(key)
    return groups
