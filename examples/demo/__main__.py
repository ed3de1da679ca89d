"""Answer prompts plainly and with drafts, and show that the text is the same and comes sooner.

    make demo          # or, with the extra `demo`: python -m examples.demo

Exit status: 0 when every text is the plain one, 1 when one is not, 2 when the demo cannot start.
"""

import argparse
import sys
from pathlib import Path


HEAD = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-head"


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--head", default=str(HEAD), help="folder or Hub id of a head for SmolLM2-135M-Instruct")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each answer")
    parser.add_argument(
        "--page", type=Path, default=Path("results/demo.html"), help="where the first answer is written, step by step"
    )
    args = parser.parse_args(arguments)
    print("demo: loading PyTorch and Transformers ...", file=sys.stderr, flush=True)
    from transformers_resps.compat import check_extra  # takes seconds

    try:
        check_extra("demo")
        from .run import run  # needs the extra

        return run(args)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
