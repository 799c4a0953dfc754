"""Learn a router from records: given a question, will the small model's answer do? (Hybrid LLM, arXiv 2404.14618)

    python train/router.py --small runs/small/eval --large runs/hyper/eval --form transformed --out runs/router

The records are those of eval/run.py, of both models on the same items; several folders of one model are several sampled answers (in the
paper 10).
Half of the items teach the router, a quarter chooses the threshold for a quality budget, and what is printed (calls saved, APGR, CPT) is of
the last quarter. Recipes use the result as `gate: {kind: transformed, path: runs/router/router.safetensors}`, and choose its threshold on
validation data of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from llava_collab.collab.gates import Floats
from llava_collab.collab.router import Form, HashedText, fit_router, routing_targets
from llava_collab.collab.thresholds import Threshold, choose_threshold
from llava_collab.data.chance import unit_interval
from llava_collab.evaluation.curves import auroc, curve
from llava_collab.evaluation.records import RecordError, read_rows
from llava_collab.types import Request, Turn


@dataclass(frozen=True)
class Args:
    """Learn a router from records of two models."""

    small: tuple[Path, ...]
    """Record folders of the small model: one, or one a sampled answer."""

    large: tuple[Path, ...]
    """Record folders of the large model, of the same items."""

    out: Path
    """Folder for router.safetensors."""

    form: Form = "transformed"
    """What it learns: deterministic (one answer each), probabilistic (all pairs of answers), transformed (where the large one nearly always
    wins)."""

    drop: float = 0.01
    """Quality budget of the calls saved: the drop against the large model, as a share of its quality."""

    epochs: int = 40
    """Passes over the items."""

    seed: int = 0
    """Draws the halves and the order."""


def main(args: Args) -> None:
    """Learn, save, print. Raises RecordError or ValueError with the cure."""
    rows = {row["sample_id"]: row for row in read_rows(args.small[0])}
    answered = [{row["sample_id"] for row in read_rows(folder) if row["score"] is not None} for folder in (*args.small, *args.large)]
    shared = sorted(set(rows).intersection(*answered))
    if len(shared) < 20:
        raise RecordError(f"the folders share {len(shared)} items; evaluate both models on the same split")
    requests = [Request(name, (Turn("user", rows[name]["prompt"]),)) for name in shared]
    small_MR, large_MR = _qualities(args.small, shared), _qualities(args.large, shared)
    place_M = np.array([unit_interval(f"router {args.seed}|{name}") for name in shared])
    teaches, chooses, tells = place_M < 0.5, (place_M >= 0.5) & (place_M < 0.75), place_M >= 0.75
    if not (teaches.any() and chooses.any() and tells.any()):
        raise RecordError(f"{len(shared)} items are too few to part into halves and quarters; evaluate more")
    learn = [requests[k] for k in np.flatnonzero(teaches)]
    router = fit_router(args.form, HashedText(), learn, small_MR[teaches], large_MR[teaches], epochs=args.epochs, seed=args.seed)
    router.save(args.out / "router.safetensors")
    confidence_M, small_M, large_M = np.array(router(requests, [])), small_MR.mean(1), large_MR.mean(1)
    of = {"gate": router.name, "small": str(args.small[0]), "large": str(args.large[0])}
    threshold = choose_threshold(confidence_M[chooses], small_M[chooses], large_M[chooses], drop=args.drop, of=of)
    told = Threshold.at(threshold.value, threshold.rule, confidence_M[tells], small_M[tells], large_M[tells], of)
    found, right = curve(confidence_M[tells], small_M[tells], large_M[tells]), (small_M[tells] >= large_M[tells]).astype(float)
    targets_M, t = routing_targets(args.form, small_MR[teaches], large_MR[teaches])
    print(f"{args.form} router, {len(learn)} items, t {t:.3g}, mean target {targets_M.mean():.2f}; on {tells.sum()} others:")
    print(f"  small {100 * found.small:.1f}, large {100 * found.large:.1f}, AUROC of 'small will do' {auroc(confidence_M[tells], right)}")
    print(f"  APGR {found.apgr()}, CPT 50 {found.cpt(0.5)}, CPT 80 {found.cpt(0.8)}")
    print(f"  {told.rule}, on a third part: {1 - told.share_large:.1%} of the calls saved at quality {100 * told.quality:.1f}")


def _qualities(folders: Sequence[Path], names: Sequence[str]) -> Floats:
    """[M,R] in [0, 1]."""
    columns = []
    for folder in folders:
        scores = {row["sample_id"]: row["score"] for row in read_rows(folder)}
        columns.append([scores[name] / 100 for name in names])
    return np.array(columns).T


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
