"""What `generate` returns beside the tokens."""

from dataclasses import dataclass

from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..telemetry.report import SpeculationReport


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with a draft head and `return_dict_in_generate=True`.

    Attributes:
        speculation: every step's shape, tokens and seconds.

    It carries the cache of a single text, from which a later call can go on. Of a batch only a cache that the caller
    passed: finished rows of any other have lost their entries.
    """

    speculation: SpeculationReport | None = None
