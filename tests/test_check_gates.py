"""Gates at their limits, and the file of thresholds."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_fixture import THRESHOLDS, judged

from gplq.errors import ConfigError
from gplq_export.check.accumulate import mean_estimate, percentile_estimate, share_estimate
from gplq_export.check.gates import Judge, Thresholds, paired_drop, read_thresholds
from gplq_export.check.report import Closeness, Estimate, Forced, Gate, Layer, Pair, Top

EXACT = Estimate(value=1.0, low=1.0, high=1.0, n=100)


def layer(name: str, different: int = 0, share: float = 0.0, **changes: Any) -> Layer:
    """``share``: per cent of an image's codes that differ."""
    content: dict[str, Any] = {
        "name": name,
        "kind": "quantizer",
        "total": 1000,
        "different": different,
        "steps": (different, 0, 0),
        "max_step": int(different > 0),
        "sqnr_db": None,
        "share": Estimate(value=share, low=share, high=share, n=100),
        "floor": None,
        "inside": True,
    }
    return Layer(**{**content, **changes})


def forced(**changes: Any) -> Forced:
    content: dict[str, Any] = {
        "images": 10,
        "quantizers": [layer("a"), layer("b")],
        "grid": {"a": 0, "b": 0},
        "linears": {"l": 1e-6, "m": 2e-5},
        "floats": {"a": 8e-5},
        "outputs": {"logits": 2e-5},
        "blocks": [layer("blocks.0"), layer("blocks.1", share=0.5)],
    }
    return Forced(**{**content, **changes})


@pytest.mark.parametrize(
    ("changes", "metric", "where", "words"),
    [
        ({"quantizers": [layer("a"), layer("b", 1)]}, "codes", "b", "1 of 2,000 codes differ"),
        ({"grid": {"a": 0, "b": 3}}, "grid", "b", "3 codes differ for numbers on and around the steps"),
        ({"linears": {"l": 2.01e-5, "m": 0.0}}, "linears", "l", "beyond the limit, first: l: its weight"),
        ({"linears": {"l": 0.0, "m": math.nan}}, "linears", "m", "differ by at most nan"),
        ({"floats": {"a": 8.01e-5}}, "floats", "a", "a norm, scale, embedding or residual before it"),
        ({"outputs": {"logits": math.inf}}, "outputs", "logits", "a norm or another float tensor"),
        ({"blocks": [layer("x"), layer("y", share=0.501)]}, "blocks", "y", "at most 0.5010 % of a block's codes"),
        ({"blocks": [layer("x"), layer("y", share=math.nan)]}, "blocks", "y", "y computes something else"),
        ({"blocks": [layer("x"), layer("y").model_copy(update={"share": None})]}, "blocks", "y", "y computes"),
    ],
)  # fmt: skip
def test_forced_gates_at_their_limits(changes: dict[str, Any], metric: str, where: str, words: str) -> None:
    assert {gate.status for gate in judged(forced()).values()} == {"passed"}
    gates = judged(forced(**changes))
    assert [name for name, gate in gates.items() if gate.status == "failed"] == [metric]
    gate = gates[metric]
    assert (gate.id, gate.layer, gate.n) == (f"int4.forced.{metric}", where, 10)
    assert words in gate.sentence
    assert gate.why
    assert gate.limit is not None


def closeness(labels: int = 100, cosine: float = 1.0, kl: float = 0.0, n: int = 100) -> Closeness:
    values = np.full(n, cosine)
    return Closeness(
        n=n,
        agreement=share_estimate(labels, n),
        cosine=mean_estimate(n * cosine, n * cosine**2, n),
        cosine_p01=percentile_estimate(values, 0.01),
        sqnr_db=None,
        kl=mean_estimate(n * kl, n * kl**2, n),
        max_difference=0.0,
    )


def free(found: Closeness, floor: Closeness | None, **changes: Any) -> dict[str, Gate]:
    judge = Judge(THRESHOLDS)
    pair = Pair(name="cpu", reference="", candidate="", file=None, skipped=None, found=found, floor=floor, **changes)
    judge.free(pair)
    return {gate.metric.removeprefix("free."): gate for gate in judge.gates}


def failing(found: Closeness, floor: Closeness) -> list[str]:
    return [name for name, gate in free(found, floor).items() if gate.status == "failed"]


def test_labels_may_differ_by_twice_what_they_do_at_the_floor() -> None:
    # 80 of 100: [71.1, 86.7] %; 98 of 100: [93.0, 99.5] %, twice of it 86.0; 99 of 100: [94.6, 99.8] %, 89.1.
    assert failing(closeness(80), closeness(90)) == []
    assert failing(closeness(80), closeness(98)) == []
    assert failing(closeness(80), closeness(99)) == ["labels"]
    gate = free(closeness(80), closeness(99), floor_is="another order")["labels"]
    assert "beyond twice what another order changes" in gate.sentence
    assert gate.limit == pytest.approx(89.1, abs=0.05)
    assert (gate.found, gate.n) == (80, 100)


@pytest.mark.parametrize("deviation", [0.01, 0.0])
def test_cosine_may_fall_by_twice_what_it_does_at_the_floor_and_by_the_last_bits(deviation: float) -> None:
    limit = 1 - 2 * deviation - 1e-5
    assert failing(closeness(cosine=limit + 1e-9), closeness(cosine=1 - deviation)) == []
    assert failing(closeness(cosine=limit - 1e-9), closeness(cosine=1 - deviation)) == ["cosine_p01"]


def test_divergence_may_be_twice_that_of_the_floor() -> None:
    assert failing(closeness(kl=2e-3 + 9e-6), closeness(kl=1e-3)) == []
    assert failing(closeness(kl=2e-3 + 1.1e-5), closeness(kl=1e-3)) == ["kl"]


def test_no_number_is_inside_no_limit() -> None:
    assert failing(closeness(cosine=math.nan, kl=math.nan), closeness(cosine=0.5, kl=1.0)) == ["cosine_p01", "kl"]


def test_without_a_floor_closeness_is_reported() -> None:
    [gate] = free(closeness(10), None).values()
    assert (gate.status, gate.metric, gate.found) == ("reported", "free.labels", 10)


def test_layers_are_judged_by_their_own_band() -> None:
    judge = Judge(THRESHOLDS)
    share = Estimate(value=1.0, low=0.9, high=1.1, n=10)
    assert judge.inside(share, Estimate(value=0.4, low=0.3, high=0.425, n=10))  # 0.85 + 0.05
    assert not judge.inside(share, Estimate(value=0.4, low=0.3, high=0.424, n=10))
    assert judge.inside(None, None)
    assert not judge.inside(Estimate(value=math.nan, low=math.nan, high=math.nan, n=10), share)
    out = layer("y", share=3.0, floor=share, inside=False)
    gate = free(closeness(), closeness(), layers=[layer("x", floor=share), out])["codes"]
    assert (gate.status, gate.layer) == ("failed", "y")
    assert "the first layer that leaves its band is y: 3.000 % of its codes differ, 1.000 %" in gate.sentence


# Accuracy


@pytest.mark.parametrize(("lost", "won", "n"), [(30, 10, 1000), (0, 0, 50), (5, 40, 300), (50, 0, 50)])
def test_paired_drop_is_the_mean_of_what_changed(lost: int, won: int, n: int) -> None:
    """By brute force: +1 for an image that was lost, -1 for one that was won, 0 for the others."""
    changes = np.repeat([1.0, -1.0, 0.0], [lost, won, n - lost - won])
    drop, low, high = paired_drop(lost, won, n)
    assert drop == pytest.approx(100 * changes.mean())
    assert (high - low) / 2 == pytest.approx(100 * 1.96 * changes.std() / n**0.5)
    assert (high + low) / 2 == pytest.approx(drop)


def accuracy(lost: int, won: int, n: int) -> Gate:
    judge = Judge(THRESHOLDS)
    tops = [Top(top1=share_estimate(n - count, n), top5=None) for count in (won, lost)]
    pair = Pair(name="float", reference="", candidate="", file=None, skipped=None, reference_top=tops[0],
                candidate_top=tops[1], lost=lost, won=won)  # fmt: skip
    judge.accuracy(pair, "top1_drop")
    return judge.gates[0]


def test_accuracy_fails_only_if_the_favourable_end_is_beyond_the_limit() -> None:
    # Of 1000 images 30 lost and none won is a drop of 3.0 points, at least 1.94; 25 at least 1.53; 24 at least 1.45.
    assert [accuracy(lost, 0, 1000).status for lost in (30, 25, 24, 0)] == ["failed", "failed", "passed", "passed"]
    assert accuracy(100, 100, 1000).status == "passed"
    gate = accuracy(25, 0, 1000)
    assert (gate.found, gate.limit, gate.unit) == (2.5, 1.5, "points")
    assert gate.low == pytest.approx(1.53, abs=0.01)
    assert gate.sentence.endswith(": more than 1.5.")


def test_few_images_are_reported_and_not_judged() -> None:
    gate = accuracy(400, 0, 499)
    assert gate.status == "reported"
    assert "too few images to judge" in gate.sentence
    assert accuracy(400, 0, 500).status == "failed"


@pytest.mark.parametrize(
    ("found", "floor", "failed"),
    [
        (closeness(5, 0.97, n=8), closeness(8, n=8), ["labels"]),  # 8 of 8: [67.6, 100] %
        (closeness(6, 0.97, n=8), closeness(8, n=8), []),
        (closeness(7, 0.79, n=8), closeness(8, n=8), ["cosine_p01"]),
        (closeness(7, 0.81, n=8), closeness(8, n=8), []),
        (closeness(8, math.nan, n=8), closeness(8, n=8), ["cosine_p01"]),
        (closeness(6, 0.6, n=8), closeness(6, 0.97, n=8), []),  # a network that rounding alone takes far
        (closeness(1, 0.2, n=1), closeness(1, n=1), ["cosine_p01"]),
    ],
)
def test_gross_difference_fails_on_any_number_of_images(found: Closeness, floor: Closeness, failed: list[str]) -> None:
    gates = free(found, floor, floor_is="another order")
    assert [name for name, gate in gates.items() if gate.status == "failed"] == failed
    assert {gate.status for name, gate in gates.items() if name not in failed} == {"reported"}
    assert all("so much that few images show it" in gates[name].sentence for name in failed)


# The file


def test_every_limit_has_a_reason_and_is_used() -> None:
    sources = [*Path(read_thresholds.__code__.co_filename).parent.glob("*.py")]
    text = "".join(path.read_text() for path in sources)
    for name, threshold in THRESHOLDS.table.items():
        assert len(threshold.why) > 20, name
        assert f'"{name.partition(".")[0]}"' in text, name  # behind the dot: the pair that it is for
    assert THRESHOLDS.version == "1.1"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_replaces_what_it_names(tmp_path: Path) -> None:
    mine = read_thresholds(written(tmp_path, "top1_drop: {limit: 0.25, why: The customer wants it.}\n"))
    assert (mine["top1_drop"], mine.why("top1_drop")) == (0.25, "The customer wants it.")
    assert mine.version == "mine.yaml, on 1.1"
    assert {name: mine[name] for name in mine.table} == {**{n: THRESHOLDS[n] for n in mine.table}, "top1_drop": 0.25}
    named = read_thresholds(written(tmp_path, "version: ours-7\nkl_resolution: {limit: 1, why: '-'}\n"))
    assert (named.version, named["kl_resolution"]) == ("ours-7", 1.0)


def test_one_limit_may_be_replaced() -> None:
    found: Thresholds = THRESHOLDS.replaced("top1_drop", 3, "Given with --max-drop.")
    assert (found["top1_drop"], found.why("top1_drop")) == (3, "Given with --max-drop.")
    assert THRESHOLDS["top1_drop"] == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top1_dropp: {limit: 1, why: x}", r"there is no threshold 'top1_dropp'; there are .*top1_drop,"),
        ("top1_drop: {limit: -1, why: x}", r"top1_drop\.limit: .*greater than or equal to 0"),
        ("top1_drop: {limit: much, why: x}", r"top1_drop\.limit: .*valid number"),
        ("top1_drop: {limit: 1}", r"top1_drop\.why: Field required"),
        ("top1_drop: {limit: 1, why: x, unit: points}", r"top1_drop\.unit: Extra inputs"),
        ("top1_drop: 2", r"top1_drop: Input should be"),
        ("top1_drop: {limit: .nan, why: x}", r"top1_drop\.limit"),
        ("- top1_drop", "are a table of names"),
        ("", "are a table of names"),
        ("{", "cannot be read as thresholds"),
        ("a: !!python/object/apply:os.mkdir [exploded]", "cannot be read as thresholds"),
    ],
)
def test_what_is_no_limit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"mine.yaml.*{message}"):
        read_thresholds(written(tmp_path, text))
    assert not Path("exploded").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml cannot be read as thresholds"):
        read_thresholds(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read as thresholds"):
        read_thresholds(tmp_path / "binary.yaml")


def test_a_pair_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    noise = forced(linears={"l": 5e-5})
    assert judged(noise)["linears"].status == "failed"
    path = tmp_path / "mine.yaml"
    path.write_text("forced_linears.openvino: {limit: 1.0e-4, why: an older OpenVINO}")
    for name, status, limit in (("openvino", "passed", 1e-4), ("cpu", "failed", 2e-5)):
        judge = Judge(read_thresholds(path))
        judge.forced(Pair(name=name, reference="a", candidate="b", file=None, skipped=None), noise)
        gates = {gate.metric.removeprefix("forced."): gate for gate in judge.gates}
        assert (gates["linears"].status, gates["linears"].limit) == (status, limit)
        assert ("older OpenVINO" in gates["linears"].why) == (name == "openvino")


@pytest.mark.parametrize(("n", "status"), [(29, "reported"), (30, "failed")])
def test_what_runs_freely_is_judged_from_thirty_images_on(n: int, status: str) -> None:
    assert free(closeness(cosine=0.9, n=n, labels=n), closeness(n=n, labels=n))["cosine_p01"].status == status
