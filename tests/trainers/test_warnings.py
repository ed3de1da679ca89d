from transformers_resps.trainers.warnings import MIN_USEFUL_TOKENS, warn_if_small


def test_a_run_too_small_to_be_useful_is_announced(caplog):
    assert not warn_if_small(MIN_USEFUL_TOKENS)
    assert not caplog.records
    assert warn_if_small(1000)
    assert "1,000 positions" in caplog.text
    assert "generate_dataset.py" in caplog.text
