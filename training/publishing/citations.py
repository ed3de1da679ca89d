"""The citations at the end of a card."""

CITATIONS = """\
## Cite

```bibtex
@misc{wang2026resps,
  title = {Speculative Sampling with Reinforcement Learning},
  author = {Chenan Wang and Daniel H. Shi and Haipeng Chen},
  year = {2026}, eprint = {2601.12212}, archivePrefix = {arXiv}
}
@misc{li2025eagle3,
  title = {{EAGLE-3}: Scaling up Inference Acceleration of Large Language Models via Training-Time Test},
  author = {Yuhui Li and Fangyun Wei and Chao Zhang and Hongyang Zhang},
  year = {2025}, eprint = {2503.01840}, archivePrefix = {arXiv}
}
@software{transformers_resps,
  title = {transformers-resps: lossless draft trees inside generate, shaped by a policy},
  year = {2026}, license = {Apache-2.0}
}
```"""
