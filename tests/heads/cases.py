"""The checkpoints that publishers upload: file, names, dtype, config fields and id convention of each."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .published import DEFAULT, WIDE, D, H, Published, V, rename, save, write_config


FLAT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": V,
    "draft_vocab_size": D,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def eagle_bin(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    torch.save(rename(tensors, "embed_tokens.weight"), folder / "pytorch_model.bin")


def with_embedding(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, tensors)


def without_embedding(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, rename(tensors, "embed_tokens.weight"))


def modelopt(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, rename(tensors, "embed_tokens.weight", "t2d", **case.options))


def speculators(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    verifier = {"verifier_norm.weight": torch.ones(H), "verifier_lm_head.weight": torch.zeros(D, H)}
    save(folder, rename(tensors, midlayer="layers.0") | verifier)


def deepspec(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, rename(tensors, midlayer="layers.0"))


def sharded(folder: Path, tensors: dict[str, Tensor], case: Published) -> None:
    write_config(folder, case.config)
    save(folder, rename(tensors, "embed_tokens.weight"), shards=3)


def specforge(**fields: Any) -> dict[str, Any]:
    return {**FLAT, "architectures": ["LlamaForCausalLMEagle3"], "head_dim": 8, **fields}


def eagle_config(ids: list[int], **fields: Any) -> dict[str, Any]:
    return {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True, **fields}


def nested(layer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Speculators writes only what differs from the layer config's defaults."""
    kept = {key: value for key, value in FLAT.items() if key not in ("draft_vocab_size", "hidden_act", "pad_token_id")}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": D,
        "transformer_layer_config": {**kept, **layer},
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": "meta-llama/Toy", "architectures": ["LlamaForCausalLM"]},
        },
        **fields,
    }


MODELOPT_FLAGS = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}
LLAMA = ["LlamaForCausalLM"]

CASES = [
    Published("yuhuili .bin", eagle_bin, {**FLAT, "architectures": LLAMA}, dtype=torch.float16),
    Published(
        "yuhuili wider than its target",
        with_embedding,
        {**FLAT, "architectures": LLAMA, "hidden_size": WIDE, "target_hidden_size": H, "num_attention_heads": 6},
        hidden=WIDE,
        heads=6,
    ),
    Published(
        "SpecForge",
        with_embedding,
        specforge(eagle_config=eagle_config([1, 2, 6]), rope_theta=1e6, rope_scaling=None),
        layers=[2, 3, 7],
        format="specforge",
        theta=1e6,
    ),
    Published(
        "SpecForge 3.1",
        without_embedding,
        specforge(fc_norm=True, norm_output=True, rope_theta=5e5, rope_scaling=LLAMA3, dtype="float32"),
        format="specforge",
        fc_norm=True,
        theta=5e5,
        llama3=True,
        dtype=torch.float32,
    ),
    Published(
        "AngelSlim",
        without_embedding,
        {
            **FLAT,
            "architectures": ["Eagle3LlamaForCausalLM"],
            "head_dim": 16,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        format="angelslim",
        head_dim=16,
    ),
    Published(  # configs/qwen2-5-vl-eagle3.json; three planes of positions, whose base its code does not set
        "SpecForge, Qwen2.5-VL",
        with_embedding,
        specforge(
            rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, use_sliding_window=False
        ),
        format="specforge",
        theta=1e4,
    ),
    Published(  # configs/qwen3-vl-8b-eagle3.json; its code takes this for plain RoPE
        "SpecForge, Qwen3-VL",
        with_embedding,
        specforge(
            rope_theta=5e6,
            rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            target_model_type="qwen3_vl",
        ),
        format="specforge",
        theta=5e6,
    ),
    Published(  # train/configs/qwen3-vl-4b-eagle3-mrope.json; its M-RoPE takes the base of the config
        "AngelSlim, Qwen3-VL",
        without_embedding,
        {
            **FLAT,
            "architectures": ["Eagle3LlamaForCausalLM"],
            "head_dim": 16,
            "rope_theta": 5000000,
            "rope_scaling": {
                "type": "default",
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
            },
            "tie_word_embeddings": True,
            "image_token_id": 60,
            "vision_start_token_id": 61,
            "modal_type": "VLM",
        },
        format="angelslim",
        head_dim=16,
        theta=5e6,
    ),
    Published(
        "ModelOpt, scrambled ids",
        modelopt,
        specforge(eagle_config=eagle_config([6, 1, 3], **MODELOPT_FLAGS), rope_theta=5e5, rope_scaling=LLAMA3),
        layers=[2, 4, 7],
        format="modelopt",
        input_norm=True,
        theta=5e5,
        llama3=True,
        options={
            "midlayer__hidden_norm": "hidden_norm",
            "midlayer__input_layernorm": "input_embeds_norm",
            "midlayer": "layers.0",
            "lm_head": "eagle_lm_head",
        },
    ),
    Published(
        "ModelOpt, the target's output head",
        modelopt,
        specforge(eagle_config=eagle_config([7, 3, 5], **MODELOPT_FLAGS), draft_vocab_size=V),
        layers=[4, 6, 8],
        format="modelopt",
        full_vocabulary=True,
        output_head=False,
    ),
    Published(
        "speculators",
        speculators,
        nested(
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            norm_before_residual=True,
            norm_output=True,
            fc_norm=True,
            eagle_aux_hidden_state_layer_ids=[0, 3, 6],
            embed_requires_grad=False,
        ),
        layers=[0, 3, 6],
        format="speculators",
        norm_before_residual=True,
        post_norm=True,
        fc_norm=True,
        theta=5e5,
        llama3=True,
    ),
    Published(
        "speculators, Qwen3 layer",
        speculators,
        nested(
            {"model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            norm_before_residual=False,
            norm_before_fc=True,
            target_hidden_size=None,
        ),
        format="speculators",
        head_dim=16,
        qk_norm=True,
        input_norm=True,
        theta=1e6,
    ),
    Published(
        "speculators, lifted SpecForge ids",
        speculators,
        nested({}, norm_before_residual=False, eagle_aux_hidden_state_layer_ids=[1, 3, 4]),
        layers=DEFAULT,
        format="speculators",
    ),
    Published(
        "DeepSpec",
        deepspec,
        {
            **FLAT,
            "architectures": ["Qwen3Eagle3Model"],
            "model_type": "qwen3",
            "head_dim": 16,
            "draft_vocab_size": None,
            "target_layer_ids": [1, 2, 4, 5, 6],
            "num_target_layers": 8,
            "ttt_length": 7,
            "step_loss_decay": 0.8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        layers=[2, 3, 5, 6, 7],
        format="deepspec",
        head_dim=16,
        qk_norm=True,
        full_vocabulary=True,
        theta=1e6,
    ),
    Published(
        "sharded, four features, two plain layers",
        sharded,
        specforge(eagle_config=eagle_config([0, 2, 4, 6]), num_hidden_layers=3, rope_theta=1e4),
        layers=[1, 3, 5, 7],
        format="specforge",
        extra_layers=2,
    ),
]
