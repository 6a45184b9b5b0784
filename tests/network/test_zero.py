"""The model under DeepSpeed's ZeRO: parameters that come and go around each module."""

import pytest
from helpers.model_workers import deepspeed_differences
from helpers.ranks import on_ranks


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_zero_stage_trains_the_same_model(tmp_path, ranks):
    cases = [(0, "paper", False), (2, "paper", False)]
    cases += [(3, head, recompute) for head in ("paper", "linear") for recompute in (False, True)]
    results = on_ranks(deepspeed_differences, cases, ranks=ranks, tmp_path=tmp_path)
    for rank in results:
        for case, (losses, singles, parameters) in zip(cases, rank, strict=True):
            # float32 sums of some dozen numbers around 5, in different orders.
            assert losses < 1e-5 and singles < 1e-5, case
            assert parameters < 1e-5, case
