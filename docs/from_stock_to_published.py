r"""Train, measure and publish a head and a policy for a stock model, in one run.

    python docs/from_stock_to_published.py --target HuggingFaceTB/SmolLM2-135M-Instruct --prompts prompts.jsonl \
        --benchmark other.jsonl --card card.yaml --repository me/smollm2 --output work/smollm2

Read `main` from top to bottom. Every step is one command of the pages in docs/, printed before it runs. If the script
is interrupted, run it again: it continues. `card.yaml` holds what no run can know (training/PUBLISHING.md). Run it in
a checkout with the extras `train` and `bench`, on an idle machine, after `hf auth login`.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_resps import AutoPolicy, DraftHead, attach


RECIPES = Path("training/recipes")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    target, work = args.target, args.output
    head, policy = f"{args.repository}-head", f"{args.repository}-policy"
    work.mkdir(parents=True, exist_ok=True)
    card = yaml.safe_load(args.card.read_text(encoding="utf-8"))

    # 1. The target writes the training data (docs/train-a-head.md).
    answers = work / "answers.jsonl"
    run("python", "training/generate_dataset.py", "--target", target, "--prompts", args.prompts, "--output", answers)

    # 2. Train a head on it, and check that the head reads its target correctly.
    recipe = write_recipe(work / "head.yaml", "head.yaml", card, target=target, datasets=[str(answers)])
    run("python", "training/train_head.py", "--config", recipe, "--output_dir", work / "head-run")
    head_folder = work / "head-run" / "head"
    run("resps", "doctor", target, head_folder)

    # 3. Measure it on prompts that it was not trained on, and publish it (training/PUBLISHING.md).
    measure(head_folder, work / "head-results", target, head_folder, args.benchmark)
    run("python", "training/publish.py", head_folder, head)

    # 4. Train a policy, measure and publish it (docs/tune-a-policy.md).
    settings = {"target": target, "head": str(head_folder), "dataset": str(args.prompts)}
    recipe = write_recipe(work / "policy.yaml", "policy.yaml", {**card, "head": head}, **settings)
    run("python", "training/train_policy.py", "--config", recipe, "--output_dir", work / "policy-run")
    policy_folder = work / "policy-run" / "policy"
    measure(policy_folder, work / "policy-results", target, head_folder, args.benchmark, "--policy", policy_folder)
    run("python", "training/publish.py", policy_folder, policy)

    # 5. Use both, as anyone can now.
    use(target, head, policy)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder or Hub id of the stock model")
    parser.add_argument("--prompts", required=True, type=Path, help="JSONL of prompts or conversations to learn from")
    parser.add_argument("--benchmark", required=True, type=Path, help="JSONL of others, to measure on")
    parser.add_argument("--card", required=True, type=Path, help="YAML: license, target_license, languages, data, ...")
    parser.add_argument("--repository", required=True, help="OWNER/NAME; -head and -policy are put behind it")
    parser.add_argument("--output", required=True, type=Path, help="folder for all that is made")
    return parser.parse_args(arguments)


def run(*words: str | Path) -> None:
    """Run a command of the docs; stop if it fails."""
    program, *rest = map(str, words)
    print(f"\n$ {shlex.join([program, *rest])}", flush=True)
    found = sys.executable if program == "python" else str(Path(sys.executable).with_name(program))
    subprocess.run([found, *rest], check=True)


def write_recipe(file: Path, base: str, card: dict[str, Any], **settings: Any) -> Path:
    """Write a recipe of training/recipes with your settings and card."""
    told = yaml.safe_load((RECIPES / base).read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump({**settings, **told, "card": card}, sort_keys=False), encoding="utf-8")
    return file


def measure(folder: Path, results: Path, target: str, head: Path, benchmark: Path, *options: str | Path) -> None:
    """Benchmark these weights, copy results and plots into their folder, and render the card."""
    run("python", "training/benchmark.py", target, head, "--dataset", benchmark, "--output", results, *options)
    for file in [results / "results.json", *results.glob("*.png")]:
        shutil.copy(file, folder)
    run("python", "training/publish.py", folder, "--render")


def use(target_name: str, head_id: str, policy_id: str) -> None:
    """Load both from the Hub, and generate with and without them."""
    tokenizer = AutoTokenizer.from_pretrained(target_name)
    target: Any = attach(AutoModelForCausalLM.from_pretrained(target_name, dtype="float32"))
    head = DraftHead.from_pretrained(head_id, target=target)
    policy = AutoPolicy.from_pretrained(policy_id)
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
    plain = target.generate(**inputs, **settings)
    out = target.generate(**inputs, **settings, assistant_model=head, policy=policy)
    assert out.sequences.tolist() == plain.sequences.tolist()
    print(f"\nThe same text. {out.speculation}")


if __name__ == "__main__":
    main()
