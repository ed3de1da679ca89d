"""Linear layers and attention of packaged code: what is replaced, and that its C++ computes what PyTorch does, by
vectors, by tiles and by the library.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels import needs_compiler, needs_instructions
from tests.targets import Architecture
from transformers_resps import FixedPolicy, TreeShape, attach
from transformers_resps.compilation import native, packages
from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.compilation.few_bits import rounding
from transformers_resps.compilation.kernels import NEVER, ONEDNN, VECTORS, Choice, Kernels, Products, reads_few_bits
from transformers_resps.compilation.native import (
    bf16_attention,
    bf16_gated,
    bf16_linear,
    pack_gated,
    pack_linear,
    use_native,
)
from transformers_resps.compilation.packages import FOLDER_VARIABLE, ModulePackages, stored_packages
from transformers_resps.compilation.parts import ProgramPart


OPERATOR = torch.ops.resps.bf16_linear.default
VECTORS_ALONE = Kernels.only(VECTORS)
# Of few rows by vectors, of more by tiles, of many by the library.
MIXED = Kernels(Choice(8, 60), Choice(8, NEVER))


class Layers(nn.Module):
    """Layers that share an input, with biases and without, of widths that fill no block, and two that stay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(64, 96, bias=False), nn.Linear(64, 40, bias=False)
        self.gate, self.up = nn.Linear(64, 71), nn.Linear(64, 71)
        self.down = nn.Linear(71, 64)  # an odd number of inputs
        self.output = nn.Linear(136, 130)  # which fill no tile
        self.to(torch.bfloat16).requires_grad_(False).eval()
        self.router = nn.Linear(64, 5, bias=False).requires_grad_(False)  # float32

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        heads = torch.cat([self.query(rows), self.key(rows)], dim=-1)
        mixed = rows + self.down(self.gate(rows).sigmoid() * self.up(rows))
        return self.output(heads), self.router(mixed.float())


def rows_of(*sizes: int, inputs: int = 64) -> Tensor:
    return torch.randn(*sizes, inputs, generator=torch.Generator().manual_seed(sum(sizes))).to(torch.bfloat16)


def exported(layers: nn.Module, rows: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(layers, (rows,), strict=False)


@pytest.fixture
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "our_kernels", lambda: (VECTORS,))
    monkeypatch.setattr(native, "chosen_kernels", lambda products, *, alike: VECTORS_ALONE)


@pytest.mark.parametrize(("widths", "inputs"), [((64,), 32), ((1,), 2), ((40, 96, 7), 48), ((130, 126), 576)])
def test_packed_weights_give_what_the_layers_give(widths: tuple[int, ...], inputs: int) -> None:
    weights = [torch.randn(width, inputs, dtype=torch.bfloat16) for width in widths]
    rows, bias = torch.randn(2, 3, inputs).to(torch.bfloat16), torch.randn(sum(widths)).to(torch.bfloat16)
    packed = pack_linear(weights)
    assert packed.shape == (-(-sum(widths) // 32), inputs // 2, 32, 2)
    torch.testing.assert_close(
        bf16_linear(rows, packed, bias, None, sum(widths), NEVER, NEVER),
        nn.functional.linear(rows, torch.cat(weights), bias),
    )
    first = torch.stack([weights[0][0, 0], weights[0][0, 1]])  # of the first output, two neighbouring inputs
    assert torch.equal(packed[0, 0, 0], first)


@torch.no_grad()
def test_layers_of_one_input_become_one_product_and_others_stay(on_any_processor: None) -> None:
    layers, rows = Layers(), rows_of(2, 3)
    program = exported(layers, rows)
    use_native(program, alike=False)
    replaced = program.graph.find_nodes(op="call_function", target=OPERATOR)
    assert [node.args[4] for node in replaced] == [96 + 40, 71 + 71, 130]
    left = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert {node.args[1].name for node in left} == {"p_down_weight", "p_router_weight"}
    for given, wanted in zip(program.module()(rows), layers(rows), strict=True):
        torch.testing.assert_close(given, wanted)


def test_without_kernels_of_ours_all_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "our_kernels", lambda: ())
    monkeypatch.setattr(native, "chosen_kernels", lambda products, *, alike: Kernels.only(ONEDNN))
    program = exported(Layers(), rows_of(2, 3))
    use_native(program, alike=False)
    assert not program.graph.find_nodes(op="call_function", target=OPERATOR)


@torch.no_grad()
def test_layers_that_the_library_always_multiplies_faster_stay(
    on_any_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def library_alone(products: Products, *, alike: bool) -> Kernels:
        asked.append(products)
        return Kernels.only(ONEDNN)

    monkeypatch.setattr(native, "chosen_kernels", library_alone)
    program = exported(Layers(), rows_of(2, 3))
    assert use_native(program, alike=False) == Kernels.only(ONEDNN)
    assert not program.graph.find_nodes(op="call_function", target=OPERATOR)
    assert asked == [Products(((64, 96), (64, 40), (64, 71), (64, 71), (136, 130)), ())]


@pytest.mark.parametrize("weight", [lambda layer: layer.weight * 2, lambda layer: layer.weight.float()])
@torch.no_grad()
def test_a_weight_that_is_computed_is_not_packed(
    weight: Callable[[nn.Linear], Tensor], on_any_processor: None
) -> None:
    class Scaled(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return nn.functional.linear(rows.to(weight(self).dtype), weight(self))

    layer = Scaled(48, 64, bias=False).to(torch.bfloat16)
    program = exported(layer, rows_of(4, inputs=48))
    use_native(program, alike=False)
    assert not program.graph.find_nodes(op="call_function", target=OPERATOR)


@needs_instructions
@needs_compiler
@pytest.mark.parametrize("kernels", [VECTORS_ALONE, MIXED], indirect=True)
@torch.no_grad()
def test_packaged_code_multiplies_by_it_alike_whatever_rows_stand_beside(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    layers = Layers()
    packages = ModulePackages(lambda: layers, "layers")
    compiled = CompiledFunction(lambda rows: layers(rows), [(0, 1)], packages=packages, name="layers")
    whole = rows_of(2, 67)
    wanted = compiled([whole])
    for given, eager in zip(wanted, layers(whole), strict=True):
        torch.testing.assert_close(given.bfloat16(), eager.bfloat16(), rtol=0.02, atol=0.02)
    for count in (2, 3, 4, 5, 6, 7, 8, 12, 13, 25, 33):  # rows in all are twice as many
        found, expected = compiled([whole[:, :count].contiguous()])[0], wanted[0][:, :count]
        if kernels == MIXED:
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(found, expected)

    (package,) = stored_packages(tmp_path)
    manifest = json.loads((package.path / "package.json").read_text())
    recipes = [json.dumps(recipe) for recipe in manifest["codes"][0]["recipes"].values()]
    assert sum("resps.pack_linear" in recipe for recipe in recipes) == 3
    assert Kernels(*(Choice(*choice) for choice in manifest["codes"][0]["kernels"])) == kernels


class Mlp(nn.Module):
    """That of Llama and its kin."""

    def __init__(self, width: int, inputs: int = 48, *, has_bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.up = (nn.Linear(inputs, width, bias=has_bias) for _ in range(2))
        self.down = nn.Linear(width, inputs, bias=False)
        self.to(torch.bfloat16).requires_grad_(False).eval()

    def gated(self, rows: Tensor) -> Tensor:
        return self.up(rows) * nn.functional.silu(self.gate(rows))

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(self.gated(rows))


class _ReadTwice(Mlp):
    def gated(self, rows: Tensor) -> Tensor:
        gate = self.gate(rows)
        return nn.functional.silu(gate) * self.up(rows) + gate


GATED = torch.ops.resps.bf16_gated.default


def test_the_gated_operator_gives_what_both_layers_give() -> None:
    mlp, rows = Mlp(96), rows_of(2, 3, inputs=48)
    packed = pack_gated(mlp.gate.weight, mlp.up.weight)
    assert packed.shape == (6, 24, 32, 2)
    torch.testing.assert_close(bf16_gated(rows, packed, None, 96, NEVER, NEVER), mlp.gated(rows))


@torch.no_grad()
def test_a_gate_and_what_it_gates_become_one_operator(on_any_processor: None) -> None:
    mlp, rows = Mlp(96), rows_of(2, 3, inputs=48)
    program = exported(mlp, rows)
    use_native(program, alike=False)
    operators = torch.ops.resps
    found = [node.target for node in program.graph.nodes if node.op == "call_function"]
    made = operators.pack_gated, operators.bf16_gated, operators.pack_linear, operators.bf16_linear
    assert found == [operator.default for operator in made]
    program.graph.lint()
    torch.testing.assert_close(program.module()(rows), mlp(rows))


@pytest.mark.parametrize("mlp", [Mlp(72), Mlp(96, has_bias=True), _ReadTwice(96)])
@torch.no_grad()
def test_of_another_width_with_a_bias_or_read_twice_both_layers_stay(mlp: Mlp, on_any_processor: None) -> None:
    program = exported(mlp, rows_of(2, 3, inputs=48))
    use_native(program, alike=False)
    assert not program.graph.find_nodes(op="call_function", target=GATED)
    torch.testing.assert_close(program.module()(rows_of(2, 3, inputs=48)), mlp(rows_of(2, 3, inputs=48)))


@needs_instructions
@needs_compiler
@pytest.mark.parametrize("kernels", [MIXED], indirect=True)
@torch.no_grad()
def test_packaged_code_rounds_what_is_gated_as_pytorch_does(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    mlp, rows = Mlp(96, 64), rows_of(3, 41, inputs=64) * torch.logspace(-3, 2, 41)[:, None].bfloat16()
    packages = ModulePackages(lambda: mlp, "an MLP")
    compiled = CompiledFunction(lambda rows: mlp.gated(rows), [(0, 1)], packages=packages, name="mlp")
    given, wanted = compiled([rows]), mlp.gated(rows)
    assert (given == wanted).float().mean() > 0.99  # sums are taken in another order
    torch.testing.assert_close(given, wanted, rtol=0.01, atol=1e-5)
    torch.testing.assert_close(compiled([rows[:2, :5].contiguous()]), given[:2, :5], rtol=0.01, atol=1e-5)
    (package,) = stored_packages(tmp_path)
    assert "resps.pack_gated" in (package.path / "package.json").read_text()


def attention_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """By the formula, in float32; of a query that sees nothing, zeros."""
    key, value = (part.float().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    mask = mask.float().masked_fill(mask == torch.finfo(mask.dtype).min, float("-inf"))
    weights = (query.float() @ key.mT * scale + mask).softmax(-1).nan_to_num(0)
    return (weights @ value).transpose(1, 2)


def asking(rows: int, heads: tuple[int, int], widths: tuple[int, int], count: int, length: int) -> list[Tensor]:
    """Query, key, value and mask of `count` tokens at the end of `length`, with padding and some that sees nothing."""
    generator = torch.Generator().manual_seed(count + length)
    query = torch.randn(rows, count, heads[0], widths[0], generator=generator)
    key, value = (torch.randn(rows, heads[1], length, width, generator=generator) for width in widths)
    seen = torch.rand(rows, 1, count, length, generator=generator) < 0.7
    seen &= torch.ones(count, length, dtype=torch.bool).tril(length - count)
    seen[:, :, :, : length // 3] &= torch.arange(rows)[:, None, None, None] != 0  # more than a tile, where it is long
    seen[-1, :, 0] = False
    mask = torch.rand(seen.shape, generator=generator)  # as a bias of positions
    hidden = torch.where(torch.arange(count)[:, None] % 2 == 0, torch.finfo(torch.bfloat16).min, float("-inf"))
    return [part.bfloat16() for part in (query, key, value, torch.where(seen, mask, hidden))]


@pytest.mark.parametrize("shown", [1, 3])
def test_the_operator_of_attention_is_the_formula(shown: int) -> None:
    query, key, value, mask = asking(2, (6, 2), (32, 64), 3, 20)
    query, mask = query.transpose(1, 2), mask.repeat(1, shown, 1, 1).contiguous()
    mask[:, -1, :, 4] += 1
    given = mask.repeat(1, 6 // shown, 1, 1) if shown == 1 else mask.repeat(1, 2, 1, 1)
    expected = attention_of(query, key, value, given, 0.2)
    torch.testing.assert_close(
        bf16_attention(query, key, value, mask, 0.2)[0].float(), expected[0], rtol=0.03, atol=0.03
    )


@needs_instructions
@needs_compiler
@pytest.mark.parametrize(
    ("kernels", "heads", "widths", "threads"),
    [(MIXED, (9, 3), (64, 128), 5), (MIXED, (4, 4), (96, 32), 2), (VECTORS_ALONE, (4, 4), (96, 32), 2)],
    indirect=["kernels"],
)
@torch.no_grad()
def test_packaged_code_attends_by_it(
    kernels: Kernels,
    heads: tuple[int, int],
    widths: tuple[int, int],
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With lengths that end inside a tile of keys, and more threads than heads, which then share them."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    layer = nn.Linear(1, 1)

    def attending(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return bf16_attention(query.transpose(1, 2), keys[:, :, 1:], values[:, :, 1:], mask, widths[0] ** -0.5)

    dynamic = [(0, 1), (0, 2), (0, 2), (0, 2, 3)]
    fast = CompiledFunction(attending, dynamic, packages=ModulePackages(lambda: layer, "it"), name="attention")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, count, length in ((2, 5, 100), (2, 2, 64), (3, 3, 65), (2, 7, 1000), (2, 90, 500), (8, 3, 30)):
            query, key, value, mask = asking(rows, heads, widths, count, length)
            longer = [nn.functional.pad(part, (0, 0, 1, 0)) for part in (key, value)]
            found = fast([query, *longer, mask])
            expected = attention_of(query.transpose(1, 2), key, value, mask, widths[0] ** -0.5)
            torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.01)
        with pytest.raises(RuntimeError):  # and reads nothing that is not there
            fast([query, *longer, mask[..., :-1].contiguous()])
    finally:
        torch.set_num_threads(before)
    assert len(stored_packages(tmp_path)) == 1


class Decoder(nn.Module):
    """A layer of Llama's kind, or with biases of Qwen2's, as Transformers computes it."""

    def __init__(self, *, has_bias: bool = False, width: int = 96, heads: int = 6, key_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.last_norm = (nn.Parameter(torch.rand(width) + 0.5) for _ in range(2))
        inner, states = heads * HEAD, key_heads * HEAD
        self.query = nn.Linear(width, inner, bias=has_bias)
        self.key, self.value = (nn.Linear(width, states, bias=has_bias) for _ in range(2))
        self.output = nn.Linear(inner, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 160, bias=False) for _ in range(2))
        self.down = nn.Linear(160, width, bias=False)
        self.to(torch.bfloat16).requires_grad_(False).eval()

    def normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        wide = rows.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * wide.to(torch.bfloat16)

    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        first, last = states[..., : HEAD // 2], states[..., HEAD // 2 :]
        return states * cosines.unsqueeze(1) + torch.cat((-last, first), dim=-1) * sines.unsqueeze(1)

    def forward(
        self, rows: Tensor, cosines: Tensor, sines: Tensor, slots: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        normed, shape = self.normed(rows, self.norm), (1, rows.shape[1], -1, HEAD)
        query, key, value = (part(normed).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        query, key = self.turned(query, cosines, sines), self.turned(key, cosines, sines)
        keys.index_copy_(2, slots[0], key)
        values.index_copy_(2, slots[0], value)
        seen = [states[:, :, : mask.shape[-1]] for states in (keys, values)]
        attended = bf16_attention(query, *seen, mask, HEAD**-0.5).transpose(1, 2)
        return self.after(rows, self.output(attended.transpose(1, 2).reshape(1, rows.shape[1], -1)))

    def after(self, rows: Tensor, attended: Tensor) -> Tensor:
        middle = rows + attended
        normed = self.normed(middle, self.last_norm)
        return middle + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class _NormedAfter(Decoder):
    def after(self, rows: Tensor, attended: Tensor) -> Tensor:
        middle = rows + self.normed(attended, self.last_norm)
        return middle + self.down(nn.functional.silu(self.gate(middle)) * self.up(middle))


class _TurnedByPairs(Decoder):
    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        first, last = states[..., : HEAD // 2], states[..., HEAD // 2 :]
        return states * cosines.unsqueeze(1) + torch.cat((last, first), dim=-1) * sines.unsqueeze(1)


class _ReadTwiceLayer(Decoder):
    def after(self, rows: Tensor, attended: Tensor) -> Tensor:
        return super().after(rows, attended) + attended


HEAD = 64
LAYER = torch.ops.resps.bf16_layer.default
CHANGING = [(1,), (1,), (1,), (1,), (2,), (2,), (2, 3)]


def decoding(count: int, *, width: int = 96, key_heads: int = 2) -> list[Tensor]:
    """The arguments of a layer for `count` tokens, at slots out of order, after 70 that are kept."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1, 20, width, generator=generator)
    angles = torch.rand(1, 20, HEAD // 2, generator=generator).repeat(1, 1, 2)
    slots = 70 + torch.randperm(20, generator=generator)
    keys, values = (torch.randn(1, key_heads, 100, HEAD, generator=generator).bfloat16() for _ in range(2))
    seen = torch.arange(90) < 70
    seen = seen | (slots[:count, None, None] == torch.arange(90)).cumsum(0).bool()[:, 0]
    mask = torch.zeros(count, 90).masked_fill(~seen, torch.finfo(torch.bfloat16).min)[None, None].bfloat16()
    given = [part[:, :count].bfloat16().contiguous() for part in (rows, angles.cos(), angles.sin())]
    return [*given, slots[None, :count].contiguous(), keys, values, mask]


def exported_layer(layer: Decoder) -> torch.export.ExportedProgram:
    dynamic = tuple({place: torch.export.Dim.DYNAMIC for place in changing} for changing in CHANGING)
    return torch.export.export(layer, tuple(decoding(5)), dynamic_shapes=dynamic, strict=False)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_layer_of_the_usual_kind_becomes_one_operator(
    has_bias: bool, bits: int, on_any_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "reads_few_bits", lambda: True)
    monkeypatch.setattr(native, "few_bits_kernel", lambda: VECTORS_ALONE.linear)
    program = exported_layer(Decoder(has_bias=has_bias))
    use_native(program, alike=False, bits=bits)
    program.graph.lint()
    (layer,) = program.graph.find_nodes(op="call_function", target=LAYER)
    assert program.graph.output_node().args[0] == (layer,)
    reading = {node for node in program.graph.nodes if set(map(str, node.all_input_nodes)) & set(DECODED)}
    assert {node.target for node in reading - {layer, layer.args[3]}} <= {SIZE, CHECK}


@pytest.mark.parametrize("kind", [_NormedAfter, _TurnedByPairs, _ReadTwiceLayer])
def test_a_layer_of_almost_that_kind_stays(kind: type[Decoder], on_any_processor: None) -> None:
    program = exported_layer(kind())
    use_native(program, alike=False)
    program.graph.lint()
    assert not program.graph.find_nodes(op="call_function", target=LAYER)


SIZE, CHECK = torch.ops.aten.sym_size.int, torch.ops.aten._assert_tensor_metadata.default
DECODED = ("rows", "cosines", "sines", "slots", "keys", "values", "mask")


def rounded(layer: Decoder, bits: int) -> Decoder:
    """A copy whose weights have the values of their codes, in 4 bits for the output's product and in 8 for others."""
    copied, operators = copy.deepcopy(layer), torch.ops.resps
    for part in copied.modules() if bits < 16 else ():
        if isinstance(part, nn.Linear):
            kind, groups = rounding(part.weight, bits)
            codes = operators.rounded_codes(part.weight, kind, groups)
            scales = operators.rounding_scales(part.weight, kind, groups)
            part.weight.copy_(operators.few_bits_weight(codes, scales, None, kind))
    return copied


TILES_ALONE = Kernels(Choice(1, NEVER), Choice(1, NEVER))


@needs_instructions
@needs_compiler
@pytest.mark.parametrize(
    ("kernels", "bits", "has_bias"),
    [
        (VECTORS_ALONE, 16, False),
        (VECTORS_ALONE, 16, True),
        (VECTORS_ALONE, 4, False),
        (TILES_ALONE, 16, False),
        (TILES_ALONE, 16, True),
        (TILES_ALONE, 8, True),
    ],
    indirect=["kernels"],
)
@torch.no_grad()
def test_packaged_code_computes_a_layer_by_it(
    kernels: Kernels, bits: int, has_bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bits < 16 and not reads_few_bits():
        pytest.skip("asks for AVX512-VBMI")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(native, "few_bits_kernel", lambda: kernels.linear)
    layer = Decoder(has_bias=has_bias)
    packages, reference = ModulePackages(lambda: layer, "a layer"), rounded(layer, bits)
    compiled = CompiledFunction(lambda *given: layer(*given), CHANGING, packages=packages, name="layer", bits=bits)
    whole = decoding(20)
    wanted = compiled(whole)
    counts = (3, 7, 20) if has_bias else (1, 3, 7, 20)
    for count in counts:
        ours, eager = decoding(count), decoding(count)
        found, expected = compiled(ours), reference(*eager)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert torch.equal(found, wanted[:, :count])
        for states, others in zip(ours[4:6], eager[4:6], strict=True):
            torch.testing.assert_close(states, others, rtol=0.02, atol=0.02)
            assert torch.equal(states[:, :, :70], others[:, :, :70])
    assert len(stored_packages(tmp_path)) == 1 + (1 in counts)  # one row has code of its own


PLAIN = FixedPolicy(TreeShape.plain())


class _SeenError(BaseException):
    """Ends compiling once the program is changed."""


@pytest.mark.parametrize(
    ("architecture", "layers"), [("llama", 2), ("qwen2", 2), ("mistral", 2), ("qwen3", 0), ("olmo2", 0)]
)
@pytest.mark.parametrize("is_exact", [False, True])
def test_a_step_runs_one_operator_a_layer_of_the_usual_kind(
    architecture: str,
    layers: int,
    is_exact: bool,
    on_any_processor: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    target = Architecture(architecture, sizes | {"num_hidden_layers": 2}).build("sdpa").bfloat16()
    operators = Counter[object]()

    def changed(program: torch.export.ExportedProgram, **options: Any) -> Kernels:
        use_native(program, **options)
        operators.update(node.target for node in program.graph.nodes)
        raise _SeenError

    monkeypatch.setattr(packages, "use_native", changed)
    with pytest.raises(_SeenError):
        attach(target, compile=True).generate(torch.tensor([[5, 7]]), policy=PLAIN, invariant=is_exact)
    assert operators[LAYER] == layers
    attending = torch.ops.resps.bf16_attention.default, torch.ops.resps.bf16_block_attention.default
    assert sum(operators[operator] for operator in attending) == 2 - layers


@pytest.mark.parametrize(("architecture", "layers"), [("llama", [2, 2, 2]), ("qwen3", [1] * 6)])
def test_layers_of_the_usual_kind_are_compiled_together(
    architecture: str, layers: list[int], on_any_processor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three equal parts remain, so that only one is compiled."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    target = Architecture(architecture, sizes | {"num_hidden_layers": 6}).build("sdpa").bfloat16()
    attentions = list[int]()

    def seen(writer: Any, program: torch.export.ExportedProgram, parts: Sequence[ProgramPart], *_: Any) -> None:
        attending = torch.ops.resps.bf16_attention.default
        attentions.extend(sum(node.target is attending for node in part.nodes) for part in parts)
        raise _SeenError

    monkeypatch.setattr(packages._Writer, "write_parts", seen)
    with pytest.raises(_SeenError):
        attach(target, compile=True).generate(torch.tensor([[5, 7]]), policy=PLAIN)
    assert attentions == [0, *layers, 0]
