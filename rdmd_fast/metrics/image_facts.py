"""What an evaluation was measured on and with: kept in the report, and printed below its table."""

import numpy as np

from rdmd_fast.metrics.exact_transport import optimal_transport
from rdmd_fast.metrics.image_report import ImageReport
from rdmd_fast.metrics.image_sets import ImageSet
from rdmd_fast.metrics.kernel_distance import SUBSET_SIZE, SUBSETS
from rdmd_fast.pixels import PixelImages

MOST_PAIRED = 3000  # images that exact transport takes seconds for


def image_facts(report: ImageReport, source: ImageSet, target: ImageSet, model: str | None) -> dict:
    """Collect the facts, in the order of the report."""
    facts = {"seed": report.seed, "source": source.summary(), "target": target.summary()}
    facts["size"] = list(source.images.shape[2:])
    if model:
        facts["model"] = model
    if report.extractor:
        extractor = report.extractor
        facts["features"] = {"file": str(extractor.path), "sha256": extractor.sha256, "input": extractor.pixels}
        facts["kid"] = {"subsets": SUBSETS, "subset_size": SUBSET_SIZE}
    if report.lpips is not None:
        facts["lpips"] = "alex"
    if report.truth is not None:
        facts["transport"] = _transport(source.images, report.truth)
    if report.judge:
        facts["knn_accuracy"] = report.judge.knn_accuracy
        if report.label is not None:
            facts["recall_real_heldout"] = report.judge.recall(report.label)
    return facts


def _transport(source: PixelImages, truth: PixelImages) -> dict[str, float]:
    """What the true translations cost beside the cheapest pairing of the same images, squared L2 an image."""
    if len(source) > MOST_PAIRED:
        return {}
    cost, assignment = optimal_transport(*(images[:].double().flatten(1) for images in (source, truth)))
    own = (assignment == np.arange(len(source))).mean()
    return {"true": float((source[:] - truth[:]).double().square().flatten(1).sum(1).mean()), "exact": cost,
            "paired_alike": float(own)}  # fmt: skip


def fact_lines(facts: dict, label: int | None) -> list[str]:
    """Format facts as lines."""
    height, width = facts["size"]
    lines = [
        f"{role}: {facts[role]['images']} images of {facts[role]['path']} at {height}x{width}, "
        f"sha256 {facts[role]['sha256'][:16]}"
        for role in ("source", "target")
    ]
    lines.append(f"seed {facts['seed']}; l2 is a Euclidean norm an image, mse_per_pixel a mean square, on [-1, 1]")
    if "features" in facts:
        features = facts["features"]
        lines.append(
            f"fid, kid: in the features of {features['file']} (sha256 {features['sha256'][:16]}, takes "
            f"{features['input']}); kid_std over {facts['kid']['subsets']} subsets"
        )
    if facts.get("transport"):
        costs = facts["transport"]
        lines.append(
            f"squared L2 an image: {costs['true']:.4g} to the truth, {costs['exact']:.4g} of exact optimal transport "
            f"between the two sets, which pairs {costs['paired_alike']:.1%} as the truth does"
        )
    if "recall_real_heldout" in facts:
        lines.append(f"3-NN's recall on the real held-out images of {label}: {facts['recall_real_heldout']:.4f}")
    return lines
