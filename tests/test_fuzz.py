"""A small part of `python -m experiments.fuzz`, in this process."""

import collections

from experiments import fuzz


def test_wrong_values_are_refused_in_one_line_or_start(tmp_path):
    results = fuzz.fuzz(60, 1, tmp_path / "room", ["vectors", "vectors_ve", "vectors_cosine"], ["vectors"], say=lambda *a, **k: None)
    assert [(r.message, c.command(tmp_path / "room")) for c, r in results if r.kind == "failure"] == []
    kinds = collections.Counter(r.kind for _, r in results)
    assert kinds["refused"] >= 30 and kinds["start"] >= 3


def test_what_the_run_itself_would_miss_is_told(tmp_path):
    """The judge: a message of Python's own, one that names nothing, and damage are failures."""
    case = fuzz.Case("vectors", ("--config.optim.lr=-1",), False)
    assert fuzz._fault(case, "error: optim.lr=-1 must be positive\n", "error: optim.lr=-1 must be positive") == ""
    for message in ("'<' not supported between instances of 'str' and 'int' in lr", "it is wrong", "lr: Traceback (most recent call last)"):
        assert fuzz._fault(case, f"error: {message}\n", f"error: {message}")
    assert fuzz._fault(case, "error: lr\nmore\n", "error: lr") and fuzz._fault(case, "", "")
