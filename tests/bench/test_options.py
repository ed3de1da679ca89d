import argparse

from transformers_resps.bench.config import BenchConfig
from transformers_resps.bench.options import add_options, read_options
from transformers_resps.tree import TreeShape


def parsed(words: str) -> BenchConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_options(parser.parse_args(words.split()))


def test_options_that_are_left_out_keep_the_defaults_of_the_config() -> None:
    assert parsed("me/target me/head --dataset a.jsonl") == BenchConfig("me/target", "me/head", ["a.jsonl"])


def test_every_option_reaches_the_config() -> None:
    words = "t h --dataset a b --policy auto mine --methods --shapes 8,4,2 1,0,1,6 --temperature 0 0.5 --limit 3"
    assert parsed(words) == BenchConfig(
        "t", "h", ["a", "b"], policies=["auto", "mine"], methods=[], temperatures=[0.0, 0.5], limit=3,
        shapes=[TreeShape(8, 4, 2), TreeShape(1, 0, 1, lookup=6)],
    )  # fmt: skip
